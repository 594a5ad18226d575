"""Chat templates: compiled once, told apart by how they take content, and rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from renderer.errors import ConfigError, RequestError

ContentFormat = Literal["openai", "string"]

# Marks where the final message ends, when the model is to continue it. A template that strips the message's blanks
# strips the mark's blank too: that is how it shows.
_MARK = "\ue000end of the final message\ue000"
_MARK_AND_BLANK = _MARK + " "


class _Generation(Extension):
    """`{% generation %}` marks what training learns from; rendering passes its content through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """One compiled template. Thread-safe.

    Attributes:
        content_format: "openai" where the template loops over a message's content, which is then a list of parts;
            "string" where it takes content as one text.
    """

    def __init__(self, source: str) -> None:
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template does not compile: {error}", "chat_template") from error
        self.content_format: ContentFormat = "openai" if _loops_over_content(tree) else "string"
        self._source = source

    def mentions(self, role: str) -> bool:
        """Whether it names a role."""
        return f"'{role}'" in self._source or f'"{role}"' in self._source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt's text.

        Raises:
            RequestError: The template refuses these messages, or fails on them.
        """
        if continue_final_message:
            messages = [*messages[:-1], _with_end_mark(messages[-1])]
        try:
            text = self._template.render(messages=messages, **variables)
        except Exception as error:  # A template is a program, and these messages are its input.
            raise RequestError(f"the chat template cannot render these messages: {error}", "messages") from error
        return _cut_at_end_mark(text) if continue_final_message else text


class ChatTemplates:
    """A model's templates by name, and those that requests brought with them. Thread-safe.

    Args:
        source: One template, or several by name; None without one.
    """

    def __init__(self, source: str | Mapping[str, str] | None) -> None:
        sources = {"default": source} if isinstance(source, str) else source or {}
        self._own = {name: ChatTemplate(text) for name, text in sources.items()}
        self._brought = lru_cache(maxsize=32)(ChatTemplate)

    @property
    def has_default(self) -> bool:
        """Whether there is one for requests that bring none."""
        return "default" in self._own

    def choose(self, brought: str | None, with_tools: bool) -> ChatTemplate:
        """The template for a request.

        Raises:
            RequestError: There is none, or the one that the request brought does not compile.
        """
        if brought is not None:
            try:
                return self._brought(brought)
            except ConfigError as error:
                raise RequestError(error.message, "chat_template") from error
        template = (self._own.get("tool_use") if with_tools else None) or self._own.get("default")
        if template is None:
            raise RequestError("the model has no chat template", "messages")
        return template


def _with_end_mark(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _MARK_AND_BLANK}
    parts = list(content or ())
    for place in reversed(range(len(parts))):
        if "text" in parts[place]:
            parts[place] = {**parts[place], "text": parts[place]["text"] + _MARK_AND_BLANK}
            return {**message, "content": parts}
    raise RequestError("continue_final_message needs a final message with text", "continue_final_message")


def _cut_at_end_mark(text: str) -> str:
    """Cut after the final message's text, and before blanks at its end if the template strips those."""
    place = text.rfind(_MARK)
    if place < 0:
        raise RequestError("the chat template drops the final message's text", "continue_final_message")
    return text[:place] if text.startswith(_MARK_AND_BLANK, place) else text[:place].rstrip()


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a `for` goes over some message's content: directly, through a variable, or inside a macro."""
    names = _Names(tree)
    in_macros = {id(loop) for macro in tree.find_all(nodes.Macro) for loop in macro.find_all(nodes.For)}
    for loop in tree.find_all(nodes.For):
        plainly_named = isinstance(loop.iter, nodes.Name) and loop.iter.name == "content"
        if names.is_content(loop.iter) or (plainly_named and id(loop) not in in_macros):
            return True
    return False


class _Names:
    """Which variables of a template hold the list of messages, one message, a message's content.

    Scopes are ignored: a name that holds content anywhere counts as content everywhere.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._lists = {"messages"}
        self._messages: set[str] = set()
        self._contents: set[str] = set()
        found = -1
        while found < (found := self._known()):
            for name, value in _bindings(tree):
                self._learn(name, value)
            for loop in tree.find_all(nodes.For):
                if isinstance(loop.target, nodes.Name) and self._is_list(loop.iter):
                    self._messages.add(loop.target.name)

    def is_content(self, node: nodes.Node | None) -> bool:
        node = _stripped(node)
        if isinstance(node, nodes.Name):
            return node.name in self._contents
        return _attribute(node) == "content" and self._is_message(_owner(node))

    def _known(self) -> int:
        return len(self._lists) + len(self._messages) + len(self._contents)

    def _learn(self, name: str, value: nodes.Node) -> None:
        if self._is_list(value):
            self._lists.add(name)
        if self._is_message(value):
            self._messages.add(name)
        if self.is_content(value):
            self._contents.add(name)

    def _is_list(self, node: nodes.Node | None) -> bool:
        node = _stripped(node)
        return isinstance(node, nodes.Name) and node.name in self._lists

    def _is_message(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice):
            return self._is_list(node.node)
        return isinstance(node, nodes.Name) and node.name in self._messages


def _stripped(node: nodes.Node | None) -> nodes.Node | None:
    """What a chain of filters and slices is applied to."""
    while isinstance(node, nodes.Filter) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
        node = node.node
    return node


def _attribute(node: nodes.Node | None) -> str | None:
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return None


def _owner(node: nodes.Node | None) -> nodes.Node | None:
    return node.node if isinstance(node, (nodes.Getattr, nodes.Getitem)) else None


def _bindings(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    """Every name that gets a value: by `set`, or as a macro's parameter in a call."""
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name):
            yield assignment.target.name, assignment.node
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is not None:
            yield from ((parameter.name, value) for parameter, value in zip(macro.args, call.args, strict=False))
            yield from ((keyword.key, keyword.value) for keyword in call.kwargs)

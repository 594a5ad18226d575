"""Messages as chat templates read them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from renderer.conversation import ChatRequest, Message, Part, TextPart
from renderer.errors import RequestError
from renderer.template import ChatTemplate, ContentFormat

_TOOL_FIELDS = ("name", "description", "parameters")
# Roles of the OpenAI API. A template that names another one takes that too.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
# A coding agent's first line of a system prompt; it differs in every request, and would keep the prompt out of any
# prefix cache.
_BILLING_HEADER = "x-anthropic-billing-header"


def template_messages(
    messages: Sequence[Message], template: ChatTemplate, placeholder_text: str | None
) -> list[dict[str, Any]]:
    """Messages in the template's own form.

    Args:
        placeholder_text: What stands for an image where content is one text; None where nothing does.

    Raises:
        RequestError: A message has a role that neither the API nor the template knows.
    """
    for place, message in enumerate(messages):
        if message.role not in _ROLES and not template.mentions(message.role):
            raise RequestError(f"the role {message.role[:64]!r} is unknown", f"messages.{place}.role")
    rendered = [_template_message(message, template.content_format, placeholder_text) for message in messages]
    if template.mentions("developer") or all(message["role"] != "developer" for message in rendered):
        return rendered
    return _merged_system_messages(rendered)


def template_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools as templates print them: known keys alone, in one order, absent ones as None."""
    return None if tools is None else [_template_tool(tool, place) for place, tool in enumerate(tools)]


def template_variables(request: ChatRequest, special_tokens: Mapping[str, str]) -> dict[str, Any]:
    """What a template may read beside the messages.

    Raises:
        RequestError: `chat_template_kwargs` claims a name that has a meaning of its own.
    """
    own = {
        "tools": template_tools(request.tools),
        "documents": None if request.documents is None else [dict(document) for document in request.documents],
        "add_generation_prompt": request.add_generation_prompt,
    }
    for name in request.chat_template_kwargs:
        if name in own or name == "messages":
            raise RequestError(f"chat_template_kwargs cannot set {name!r}", "chat_template_kwargs")
    return {**special_tokens, **own, **request.chat_template_kwargs}


def _parts(message: Message) -> tuple[Part, ...]:
    if message.content is None:
        return ()
    return (TextPart(message.content),) if isinstance(message.content, str) else message.content


def _template_message(message: Message, form: ContentFormat, placeholder_text: str | None) -> dict[str, Any]:
    parts = _without_billing_header(message) if message.role == "system" else _parts(message)
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    content: Any
    if message.role == "tool" and len(texts) == len(parts):
        content = "\n".join(texts)
    elif form == "openai":
        content = [_template_part(part) for part in parts]
    else:
        placeholders = [] if placeholder_text is None else [placeholder_text] * (len(parts) - len(texts))
        content = "\n".join([*placeholders, *texts])
    return {"role": message.role, "content": content, **_template_extra(message)}


def _without_billing_header(message: Message) -> tuple[Part, ...]:
    parts: list[Part] = []
    for part in _parts(message):
        if isinstance(part, TextPart) and part.text.startswith(_BILLING_HEADER):
            rest = part.text.partition("\n")[2]
            if rest:
                parts.append(TextPart(rest))
        else:
            parts.append(part)
    return tuple(parts)


def _template_part(part: Part) -> dict[str, str]:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}


def _template_extra(message: Message) -> dict[str, Any]:
    extra = {name: value for name, value in message.extra.items() if value is not None}
    reasoning = extra.get("reasoning", extra.get("reasoning_content"))
    if reasoning is not None:
        extra["reasoning"] = extra["reasoning_content"] = reasoning
    if message.role == "assistant" and extra.get("tool_calls"):
        extra["tool_calls"] = [_with_parsed_arguments(call) for call in extra["tool_calls"]]
    else:
        extra.pop("tool_calls", None)
    return extra


def _with_parsed_arguments(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise RequestError("an assistant's tool call needs a function", "messages.tool_calls")
    function = copy.deepcopy(dict(call["function"]))
    function["arguments"] = _parsed_arguments(function.get("arguments"))
    return {**call, "function": function}


def _parsed_arguments(arguments: Any) -> Any:
    """The arguments as an object; what is none becomes an empty one, so that the conversation can go on."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return {}
    return arguments if isinstance(arguments, Mapping) else {}


def _template_tool(tool: Mapping[str, Any], place: int) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping) or "name" not in function:
        raise RequestError("a tool needs a function with a name", f"tools.{place}.function")
    kept = {name: function.get(name) for name in _TOOL_FIELDS}
    if function.get("strict") is not None:
        kept["strict"] = function["strict"]
    return {"type": "function", "function": kept}


def _merged_system_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`developer` becomes `system`, and all system messages become one, in front."""
    system = [message for message in messages if message["role"] in ("system", "developer")]
    others = [message for message in messages if message["role"] not in ("system", "developer")]
    if len(system) == 1 and messages[0] is system[0]:
        return [{**system[0], "role": "system"}, *others]
    texts = [_text(message["content"]) for message in system]
    return [{"role": "system", "content": "\n\n".join(text for text in texts if text)}, *others]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if "text" in part)

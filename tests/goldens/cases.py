"""What is asked of every family: one list for the recorder, which asks the peer, and for the tests, which ask us."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from renderer.conversation import ChatRequest, CompletionRequest, ImagePart, Message, TextPart
from tests.checkpoints import IMAGE_FAMILIES
from tests.goldens.pictures import picture

Words = str | TextPart | ImagePart
PHOTO, OTHER, SMALL = "rgb-320x240.jpg", "rgb-240x320.png", "rgb-97x61.png"


@dataclass(frozen=True, slots=True)
class Case:
    """One request.

    Attributes:
        tensors: Whether the tensors are recorded too, or the layout alone.
    """

    name: str
    request: ChatRequest | CompletionRequest
    tensors: bool = False


@cache
def cases(family: str) -> Mapping[str, Case]:
    """All requests for a family by name, in the order they are asked: pictures alone first, then in company."""
    found = [*_sizes(family), *_formats(family), *_placements(family), *_texts(), *_completions()]
    named = {case.name: case for case in found}
    if len(named) != len(found):
        raise ValueError(f"two cases of {family} have one name")
    return named


def pictures(family: str) -> tuple[str, ...]:
    """Names of the pictures that the family's cases show."""
    if family not in IMAGE_FAMILIES:
        return (SMALL,)
    return tuple(sorted({PHOTO, OTHER, SMALL, *_SIZES, *_OPTION_SIZES, *_FORMATS}))


def image(name: str) -> ImagePart:
    return ImagePart(data=picture(name))


def user(*words: Words) -> Message:
    return Message("user", tuple(TextPart(word) if isinstance(word, str) else word for word in words))


def assistant(text: str) -> Message:
    return Message("assistant", text)


def chat(*messages: Message, **options: Any) -> ChatRequest:
    return ChatRequest(messages, **options)


_SIZES = (
    "rgb-640x480.jpg", "rgb-480x640.png", "rgb-1280x720.jpg", "rgb-336x336.png", "rgb-224x224.png", "rgb-448x448.png",
    "rgb-896x896.jpg", "rgb-97x61.png", "rgb-28x28.png", "rgb-513x512.png", "rgb-1x1.png", "rgb-1x100.png",
    "rgb-100x1.png", "rgb-3x3.png", "rgb-3x500.png", "rgb-500x3.png", "rgb-1000x20.png", "rgb-20x1000.png",
    "rgb-2000x300.jpg", "rgb-300x2000.jpg", "rgb-1x400.png", "rgb-4096x3072.jpg", "rgb-385x1155.png",
)  # fmt: skip
_FORMATS = (
    "rgb-120x80.png", "rgb-120x80.jpg", "rgb-120x80.webp", "rgb-120x80.gif", "rgb-120x80.avif", "rgb-120x80.bmp",
    "rgb-120x80.tif", "gray-120x80.png", "gray-120x80.jpg", "bit-120x80.png", "cmyk-120x80.jpg", "alpha.png",
    "alpha.webp", "gray-alpha.png", "palette.png", "palette-transparent.png", "colour-key.png", "gray-16-bit.png",
    "progressive.jpg", "full-chroma.jpg", "lossless.webp", "animated.gif", "animated.webp", "animated.png",
    "turned-3.jpg", "turned-5.jpg", "turned-6.jpg", "turned-6.png", "turned-8.webp", "truncated.jpg", "truncated.png",
    "words.png", "empty.png",
)  # fmt: skip
_OPTIONS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "qwen2_vl": ({"max_pixels": 50176}, {"size": {"shortest_edge": 200704, "longest_edge": 401408}}),
    "qwen2_5_vl": ({"max_pixels": 50176}, {"min_pixels": 401408, "max_pixels": 802816}),
    "qwen3_vl": ({"size": {"shortest_edge": 4096, "longest_edge": 65536}},),
    "gemma3": ({"do_pan_and_scan": True},),
    "idefics3": ({"size": {"longest_edge": 728}}, {"do_image_splitting": False}),
    "smolvlm": ({"size": {"longest_edge": 1024}}, {"do_image_splitting": False}),
    "internvl": ({"max_patches": 4}, {"crop_to_patches": False}),
    "pixtral": ({"size": {"longest_edge": 512}},),
    "mistral3": ({"size": {"longest_edge": 728}},),
}
_OPTION_SIZES = ("rgb-1280x720.jpg", "rgb-300x2000.jpg", "rgb-97x61.png")
_JOINED_TEMPLATE = (
    "{%- for message in messages -%}{{- message['role'] + ': ' + message['content'] + '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}"
)
TOOLS = (
    {
        "type": "function",
        "function": {
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where, e.g. Zürich"},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
            "name": "get_weather",
            "description": "The weather of the coming days.",
        },
    },
    {"type": "function", "function": {"name": "now", "strict": True}},
)
_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Bern", "days": 2}'},
}


def _sizes(family: str) -> Iterator[Case]:
    if family not in IMAGE_FAMILIES:
        return
    for name in _SIZES:
        yield Case(f"size {name}", chat(user(image(name), "What is this?")), tensors=True)
    for number, options in enumerate(_OPTIONS.get(family, ())):
        for name in _OPTION_SIZES:
            request = chat(user(image(name), "What is this?"), mm_processor_kwargs=options)
            yield Case(f"options {number} {name}", request, tensors=True)


def _formats(family: str) -> Iterator[Case]:
    if family in IMAGE_FAMILIES:
        for name in _FORMATS:
            yield Case(f"format {name}", chat(user(image(name), "What is this?")), tensors=True)


def _placements(family: str) -> Iterator[Case]:
    if family not in IMAGE_FAMILIES:
        yield Case("an image for a text model", chat(user(image(SMALL), "What is this?")))
        return
    one, two, three = image(PHOTO), image(OTHER), image(SMALL)
    yield Case("image before text", chat(user(one, "What is this?")))
    yield Case("image after text", chat(user("What is this?", one)))
    yield Case("image between texts", chat(user("Look at this: ", one, " What is it?")))
    yield Case("image alone", chat(user(one)))
    yield Case("image between newlines", chat(user("Look:\n\n", one, "\n\nWell?")))
    yield Case("image between single newlines", chat(user("Look:\n", one, "\nWell?")))
    yield Case("image between many newlines", chat(user("Look:\n\n\n\n\n", one, "\n\n\nWell?")))
    yield Case("image between blanks", chat(user("Look:  ", one, "   Well?")))
    yield Case("two images", chat(user(one, two, "Compare them.")), tensors=True)
    yield Case("three images among texts", chat(user("A ", one, " B ", two, three, " C")), tensors=True)
    yield Case("the same image twice", chat(user(one, "and", one, "are they the same?")), tensors=True)
    yield Case(
        "images in several turns", chat(user(one, "What is this?"), assistant("A disc."), user(two, "And this?"))
    )
    yield Case("an image in an early turn", chat(user("This: ", one), assistant("A disc."), user("Which colour?")))
    yield Case("an image and a system prompt", chat(Message("system", "Answer briefly."), user(one, "What is this?")))
    yield Case("an image in the system prompt", chat(Message("system", (TextPart("See "), one)), user("What is this?")))
    yield Case("an image and no generation prompt", chat(user(one, "What?"), add_generation_prompt=False))
    yield Case("an image and a final message to continue", _continued(user(one, "What is this?")))
    yield Case("an image and tools", chat(user(one, "What is this?"), tools=TOOLS, tool_choice="none"))
    yield Case("numbered images", chat(user(one, two, "Compare."), chat_template_kwargs={"add_vision_id": True}))
    yield Case("images for a template of strings", chat(user("Look:", one, "and", two), chat_template=_JOINED_TEMPLATE))
    yield Case("a text that spells the placeholder", chat(user(f"What is {_placeholder(family)}?")))
    yield Case(
        "a text that spells the placeholder beside an image", chat(user(one, f"What is {_placeholder(family)}?"))
    )
    yield Case("eight images", chat(user(*[image("rgb-640x480.jpg")] * 8, "Compare them.")))


def _placeholder(family: str) -> str:
    """The text that stands for an image in a prompt of this family."""
    spelled = {
        "gemma3": "<start_of_image>",
        "internvl": "<IMG_CONTEXT>",
        "pixtral": "[IMG]",
        "mistral3": "[IMG]",
    }
    return "<|image_pad|>" if family.startswith("qwen") else spelled.get(family, "<image>")


def _continued(*messages: Message) -> ChatRequest:
    return chat(*messages, assistant("It is a"), add_generation_prompt=False, continue_final_message=True)


def _texts() -> Iterator[Case]:
    ask = user("What is the capital of France?")
    yield Case("text", chat(ask))
    yield Case("text as a string", chat(Message("user", "What is the capital of France?")))
    yield Case("text in parts", chat(user("What is", " the capital", "of France?")))
    yield Case("empty text", chat(Message("user", "")))
    yield Case("no parts", chat(Message("user", ())))
    yield Case("no content", chat(ask, Message("assistant", None), user("Well?")))
    yield Case("unicode", chat(user("Größe? 日本語 😀 \u200bzero \x7f e\u0301")))
    yield Case("blanks around", chat(user("  \n two lines\n\n\n\nand three  \n")))
    yield Case("system prompt", chat(Message("system", "Answer briefly."), ask))
    yield Case("system prompt in parts", chat(Message("system", (TextPart("Answer"), TextPart("briefly."))), ask))
    yield Case("two system prompts", chat(Message("system", "One."), Message("system", "Two."), ask))
    yield Case("developer prompt", chat(Message("developer", "Answer briefly."), ask))
    yield Case("a late system prompt", chat(ask, assistant("Paris."), Message("system", "Be kind."), user("Sure?")))
    yield Case("several turns", chat(ask, assistant("Paris."), user("And of Spain?")))
    yield Case("no generation prompt", chat(ask, assistant("Paris."), add_generation_prompt=False))
    yield Case("a final message to continue", _continued(ask))
    yield Case("two users in a row", chat(ask, user("Please.")))
    yield Case("an unknown role", chat(Message("wizard", "Abracadabra.")))
    yield Case("special tokens on top", chat(ask, add_special_tokens=True))
    yield Case("tools", chat(ask, tools=TOOLS, tool_choice="none"))
    yield Case("tools and a system prompt", chat(Message("system", "Be brief."), ask, tools=TOOLS, tool_choice="none"))
    yield Case("tool calls", _tool_calls())
    yield Case("template arguments", chat(ask, chat_template_kwargs={"date_string": "1 May 2026", "unheard_of": 1}))
    yield Case("a template of one's own", chat(Message("system", "Brief."), ask, chat_template=_JOINED_TEMPLATE))
    yield Case("truncated at the left", chat(ask, truncate_prompt_tokens=7, truncation_side="left"))
    yield Case("truncated at the right", chat(ask, truncate_prompt_tokens=7, truncation_side="right"))
    yield Case("truncated", chat(ask, truncate_prompt_tokens=7))


def _tool_calls() -> ChatRequest:
    calls = Message("assistant", None, {"tool_calls": [_CALL, {**_CALL, "id": "call_2"}]})
    answers = (
        Message("tool", '{"sky": "blue"}', {"tool_call_id": "call_1"}),
        Message("tool", (TextPart("rain"), TextPart("later")), {"tool_call_id": "call_2"}),
    )
    return chat(user("Weather?"), calls, *answers, tools=TOOLS, tool_choice="none")


def _completions() -> Iterator[Case]:
    yield Case("completion", CompletionRequest(("Once upon a time",)))
    yield Case("completions of several prompts", CompletionRequest(("Once", "upon a\n\ntime", " 日本")))
    yield Case("completion without special tokens", CompletionRequest(("Once upon a time",), add_special_tokens=False))
    yield Case("completion of token ids", CompletionRequest(((5, 6, 7, 300), (8,))))
    yield Case("completion truncated", CompletionRequest(("Once upon a time",), truncate_prompt_tokens=3))


def body(case: Case, model: str) -> dict[str, Any]:
    """The request as OpenAI's API has it."""
    request = case.request
    common: dict[str, Any] = {"model": model, "add_special_tokens": request.add_special_tokens}
    if request.truncate_prompt_tokens is not None:
        common |= {"truncate_prompt_tokens": request.truncate_prompt_tokens}
    if request.truncation_side is not None:
        common |= {"truncation_side": request.truncation_side}
    if isinstance(request, CompletionRequest):
        prompts: list[Any] = [p if isinstance(p, str) else list(p) for p in request.prompts]
        return {**common, "prompt": prompts}
    return {**common, **_chat_body(request), "mm_payload": "tensors" if case.tensors else "none"}


def _chat_body(request: ChatRequest) -> dict[str, Any]:
    optional = {
        "tools": request.tools and list(request.tools),
        "tool_choice": request.tool_choice,
        "chat_template": request.chat_template,
        "chat_template_kwargs": dict(request.chat_template_kwargs),
        "mm_processor_kwargs": dict(request.mm_processor_kwargs),
    }
    return {
        "messages": [message_body(message) for message in request.messages],
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
        **{name: value for name, value in optional.items() if value},
    }


def message_body(message: Message) -> dict[str, Any]:
    content: Any = message.content
    if isinstance(content, tuple):
        content = [_part(part) for part in content]
    return {"role": message.role, "content": content, **message.extra}


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    url = "data:application/octet-stream;base64," + base64.b64encode(part.data or b"").decode()
    return {"type": "image_url", "image_url": {"url": url}}

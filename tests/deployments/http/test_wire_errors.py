"""The wire protocol's table of mistakes, case by case: status, type and the field at fault.

Where the peer itself is wrong (a mistake of the caller's answered with 500 or 501, or taken in silence) the case says
what is right.
"""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image

from deployments.backends import LocalBackend
from deployments.config import GreenroomConfig
from deployments.front import Front
from deployments.http.routes import http_app
from deployments.operations import Operations
from deployments.records import Record
from deployments.rendering import RenderOnly
from renderer.renderer import Renderer
from tests.stack.helpers import picture

CONFIG = GreenroomConfig.model_validate(
    {
        "model": "demo/model",
        "renderer": {
            "media_threads": 1,
            "render_threads": 1,
            "limit_mm_per_prompt": {"image": 2},
            "fetch": {"retries": 0},
        },
        "engine": None,
    }
)
CHAT, TEXT = "/v1/chat/completions/render", "/v1/completions/render"
SCHEMA, LATER = "Bad Request", "BadRequestError"
HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
PART = "messages.0.content.0"


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def say(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def show(url: Any, times: int = 1, **fields: Any) -> dict[str, Any]:
    return say([{"type": "image_url", "image_url": {"url": url}, **fields}] * times)


def hello(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


TRUNCATED = picture(0).url[: picture(0).url.index(",") + 401]
TOO_MUCH = [{"type": "text", "text": "word " * 4000}, {"type": "image_url", "image_url": {"url": png(900, 900)}}]
REFUSED: dict[str, tuple[str, Any, int, str, str | None]] = {
    "bad JSON": (CHAT, b'{"messages":', 400, SCHEMA, "body.12"),
    "an empty body": (CHAT, b"", 400, SCHEMA, "body.0"),
    "null": (CHAT, b"null", 400, SCHEMA, "body"),
    "a list": (CHAT, b"[]", 400, SCHEMA, "body"),
    "not UTF-8": (CHAT, b'{"a":"\xff"}', 400, SCHEMA, "body.0"),
    "an unknown model": (CHAT, hello(model="other"), 404, "NotFoundError", "model"),
    "a model that is a number": (CHAT, hello(model=5), 400, SCHEMA, "body.model"),
    "no messages": (CHAT, {}, 400, SCHEMA, "body.messages"),
    "empty messages": (CHAT, {"messages": []}, 400, LATER, "messages"),
    "null messages": (CHAT, {"messages": None}, 400, LATER, "messages"),
    "messages that are a text": (CHAT, {"messages": "hi"}, 400, SCHEMA, "body.messages"),
    "a message that is a text": (CHAT, {"messages": ["hi"]}, 400, SCHEMA, "body.messages.0"),
    "a message without a role": (CHAT, {"messages": [{"content": "a"}]}, 400, SCHEMA, "body.messages.0.role"),
    "a role that is a number": (CHAT, {"messages": [{"role": 1}]}, 400, SCHEMA, "body.messages.0.role"),
    "an unknown role": (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, 400, LATER, "messages.0.role"),
    "content that is null": (CHAT, say(None), 400, SCHEMA, "body.messages.0"),
    "content that is a number": (CHAT, say(5), 400, SCHEMA, "body.messages.0.content"),
    "a prompt longer than the context": (CHAT, say("word " * 20000), 400, LATER, "input_tokens"),
    "a prompt that its characters show to be too long": (CHAT, say("x" * 2_000_000), 400, LATER, "input_text"),
    "images that expand past the context": (CHAT, say(TOO_MUCH), 400, LATER, "input_tokens"),
    "base64 that is none": (CHAT, show("data:image/png;base64,@@@@"), 400, LATER, "image_url"),
    "base64 with bad padding": (CHAT, show("data:image/png;base64,AAA"), 400, LATER, "image_url"),
    "no bytes": (CHAT, show("data:image/png;base64,"), 400, LATER, "image_url"),
    "bytes that are no image": (CHAT, show("data:image/png;base64,aGVsbG8="), 400, LATER, "image_url"),
    "a truncated image": (CHAT, show(TRUNCATED), 400, LATER, "image_url"),
    "a data URL without a comma": (CHAT, show("data:image/png;base64"), 400, LATER, "image_url"),
    "a data URL that is not base64": (CHAT, show("data:text/plain,hello"), 400, LATER, "image_url"),
    "an address inside": (CHAT, show("http://127.0.0.1:1/a"), 403, "PermissionDeniedError", "image_url"),
    "a host that is not there": (CHAT, show("http://no.invalid/a"), 422, "UnprocessableEntityError", "image_url"),
    "a file": (CHAT, show("file:///etc/passwd"), 403, "PermissionDeniedError", "image_url"),
    "another scheme": (CHAT, show("ftp://a/b"), 400, LATER, "image_url"),
    "a bare path": (CHAT, show("a/b.png"), 400, LATER, "image_url"),
    "an empty URL": (CHAT, show(""), 400, LATER, "image_url"),
    "a null image_url": (CHAT, say([{"type": "image_url", "image_url": None}]), 400, LATER, "image_url"),
    "an image_url of a number": (CHAT, say([{"type": "image_url", "image_url": 5}]), 400, LATER, f"{PART}.image_url"),
    "an unknown part": (CHAT, say([{"type": "wat"}]), 400, LATER, f"{PART}.type"),
    "a part without a type": (CHAT, say([{"text": "a"}]), 400, LATER, f"{PART}.type"),
    "a part that is a number": (CHAT, say([5]), 400, LATER, PART),
    "a part that is a text": (CHAT, say(["a"]), 400, LATER, PART),
    "a text part without text": (CHAT, say([{"type": "text"}]), 400, LATER, f"{PART}.text"),
    "a bogus detail": (CHAT, say([{"type": "input_image", "detail": "x"}]), 400, LATER, f"{PART}.detail"),
    "too many images": (CHAT, show(picture(0).url, times=3), 400, LATER, "image"),
    "audio": (CHAT, say([{"type": "input_audio", "input_audio": {}}]), 400, LATER, f"{PART}.type"),
    "video": (CHAT, say([{"type": "video_url", "video_url": {}}]), 400, LATER, f"{PART}.type"),
    "embeddings of an image": (CHAT, say([{"type": "image_embeds"}]), 400, LATER, f"{PART}.type"),
    "an image too narrow": (CHAT, show(png(1, 400)), 400, LATER, "image_url"),
    "an unknown uuid": (CHAT, show(None, uuid="zz"), 400, LATER, "image_url"),
    "a uuid too long": (CHAT, show(None, uuid="z" * 257), 400, LATER, "uuid"),
    "max_tokens -1": (CHAT, hello(max_tokens=-1), 400, LATER, "max_tokens"),
    "max_tokens 0": (CHAT, hello(max_tokens=0), 400, LATER, "max_tokens"),
    "max_tokens beyond the context": (CHAT, hello(max_tokens=9999), 400, LATER, "max_tokens"),
    "its newer name": (CHAT, hello(max_completion_tokens=9999), 400, LATER, "max_completion_tokens"),
    "max_tokens that is a text": (CHAT, hello(max_tokens="x"), 400, SCHEMA, "body.max_tokens"),
    "max_tokens with a fraction": (CHAT, hello(max_tokens=1.5), 400, SCHEMA, "body.max_tokens"),
    "temperature below": (CHAT, hello(temperature=-1), 400, LATER, "temperature"),
    "temperature above": (CHAT, hello(temperature=3), 400, LATER, "temperature"),
    "top_p below": (CHAT, hello(top_p=0), 400, LATER, "top_p"),
    "top_p above": (CHAT, hello(top_p=1.1), 400, LATER, "top_p"),
    "top_k": (CHAT, hello(top_k=-2), 400, LATER, "top_k"),
    "n": (CHAT, hello(n=0), 400, LATER, "n"),
    "presence_penalty": (CHAT, hello(presence_penalty=3), 400, LATER, "presence_penalty"),
    "greedy choices": (CHAT, hello(n=2, temperature=0), 400, LATER, "n"),
    "an empty stop string": (CHAT, hello(stop=[""]), 400, LATER, "stop"),
    "five stop strings": (CHAT, hello(stop=list("abcde")), 400, SCHEMA, "body.stop"),
    "top_logprobs without logprobs": (CHAT, hello(top_logprobs=2), 400, LATER, "top_logprobs"),
    "logit_bias": (CHAT, hello(logit_bias={"abc": 1}), 400, LATER, "logit_bias"),
    "stream_options": (CHAT, hello(stream_options={"include_usage": True}), 400, LATER, "stream_options"),
    "no tools": (CHAT, hello(tools=[]), 400, LATER, "tools"),
    "a tool that must be called": (CHAT, hello(tools=[TOOL], tool_choice="required"), 400, LATER, "tool_choice"),
    "a tool that is named": (
        CHAT,
        hello(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}}),
        400,
        LATER,
        "tool_choice",
    ),
    "tool_choice without tools": (CHAT, hello(tool_choice="auto"), 400, LATER, "tool_choice"),
    "a tool without a function": (CHAT, hello(tools=[{"type": "function"}]), 400, SCHEMA, "body.tools.0.function"),
    "beam search": (CHAT, hello(use_beam_search=True), 400, LATER, "use_beam_search"),
    "a template": (CHAT, hello(chat_template="x"), 400, LATER, "chat_template"),
    "processor options": (CHAT, hello(mm_processor_kwargs={"a": 1}), 400, LATER, "mm_processor_kwargs"),
    "options of reading": (CHAT, hello(media_io_kwargs={"a": 1}), 400, LATER, "media_io_kwargs"),
    "a final message that goes on": (CHAT, hello(continue_final_message=True), 400, LATER, "continue_final_message"),
    "an empty salt": (CHAT, hello(cache_salt=""), 400, LATER, "cache_salt"),
    "a salt with @": (CHAT, hello(cache_salt="a@b"), 400, LATER, "cache_salt"),
    "a salt too long": (CHAT, hello(cache_salt="a" * 129), 400, LATER, "cache_salt"),
    "another payload": (CHAT, hello(mm_payload="x"), 400, SCHEMA, "body.mm_payload"),
    "truncation beyond": (CHAT, hello(truncate_prompt_tokens=9999), 400, LATER, "truncate_prompt_tokens"),
    "truncation into an image": (
        CHAT,
        {**show(picture(0).url), "truncate_prompt_tokens": 20},
        400,
        LATER,
        "truncate_prompt_tokens",
    ),
    "no prompt": (TEXT, {}, 400, LATER, "prompt"),
    "a null prompt": (TEXT, {"prompt": None}, 400, LATER, "prompt"),
    "an empty prompt": (TEXT, {"prompt": ""}, 400, LATER, "prompt"),
    "an empty list": (TEXT, {"prompt": []}, 400, LATER, "prompt"),
    "a list of an empty list": (TEXT, {"prompt": [[]]}, 400, LATER, "prompt"),
    "a list of an empty text": (TEXT, {"prompt": [""]}, 400, LATER, "prompt"),
    "a negative token": (TEXT, {"prompt": [-1]}, 400, SCHEMA, "body.prompt"),
    "a mixed list": (TEXT, {"prompt": [1, "a"]}, 400, SCHEMA, "body.prompt"),
    "a prompt that is a number": (TEXT, {"prompt": 5}, 400, SCHEMA, "body.prompt"),
    "a suffix": (TEXT, {"prompt": "a", "suffix": "b"}, 400, LATER, "suffix"),
    "an echo": (TEXT, {"prompt": "a", "echo": True}, 400, LATER, "echo"),
    "best_of": (TEXT, {"prompt": "a", "best_of": 2}, 400, LATER, "best_of"),
    "too many prompts": (TEXT, {"prompt": ["a"] * 1025}, 400, LATER, "prompt"),
    "neither prompt nor messages": ("/tokenize", {}, 400, SCHEMA, "body.prompt"),
    "a list to tokenize": ("/tokenize", {"prompt": ["a"]}, 400, SCHEMA, "body.prompt"),
    "no tokens": ("/detokenize", {}, 400, SCHEMA, "body.tokens"),
    "negative tokens": ("/detokenize", {"tokens": [-1]}, 400, SCHEMA, "body.tokens.0"),
    "tokens beyond 63 bits": ("/detokenize", {"tokens": [2**63]}, 400, SCHEMA, "body.tokens.0"),
    "tokens beyond 32 bits": ("/detokenize", {"tokens": [2**40]}, 400, LATER, "tokens"),
    "tokens that are texts": ("/detokenize", {"tokens": ["a"]}, 400, SCHEMA, "body.tokens.0"),
}
TAKEN: dict[str, tuple[str, Any]] = {
    "a message without content": (CHAT, {"messages": [{"role": "user"}]}),
    "empty content": (CHAT, say("")),
    "no parts": (CHAT, say([])),
    "max_tokens above what is left": (CHAT, hello(max_tokens=4096)),
    "top_logprobs that only an engine could refuse": (CHAT, hello(logprobs=True, top_logprobs=100)),
    "tools": (CHAT, hello(tools=[TOOL])),
    "numbers written as texts": (CHAT, hello(max_tokens="5", temperature="0.5")),
    "a parameter that means nothing": (CHAT, hello(user="me", metadata={"a": "b"})),
    "a token beyond the vocabulary": (TEXT, {"prompt": [10**6]}),
    "a text too long for the model": ("/tokenize", {"prompt": "word " * 20000}),
    "a conversation too long for the model": ("/tokenize", say("word " * 20000)),
    "nothing to tokenize": ("/tokenize", {"prompt": ""}),
    "tokens beyond the vocabulary": ("/detokenize", {"tokens": [10**6]}),
    "nothing to detokenize": ("/detokenize", {"tokens": []}),
}


@pytest.fixture
async def http(renderer: Renderer) -> AsyncIterator[httpx.AsyncClient]:
    backend = LocalBackend(RenderOnly(renderer, Record("render")))
    app = http_app(Operations(Front(CONFIG, backend), Record("render")))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://greenroom", timeout=60) as client:
        yield client


async def post(http: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    if isinstance(body, bytes):
        return await http.post(path, content=body, headers={"content-type": "application/json"})
    return await http.post(path, json=body)


@pytest.mark.parametrize("name", REFUSED)
async def test_a_mistake_has_its_status_its_type_and_its_field(http: httpx.AsyncClient, name: str) -> None:
    path, body, status, kind, param = REFUSED[name]
    response = await post(http, path, body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"], error["code"]) == (status, kind, param, status), error
    assert error["message"]


@pytest.mark.parametrize("name", TAKEN)
async def test_what_is_no_mistake_is_taken(http: httpx.AsyncClient, name: str) -> None:
    response = await post(http, *TAKEN[name])
    assert response.status_code == 200, response.text


async def test_a_prompt_as_long_as_the_context_leaves_no_token_to_generate(
    http: httpx.AsyncClient, renderer: Renderer
) -> None:
    response = await post(http, TEXT, {"prompt": [1] * renderer.max_model_len})
    error = response.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (400, LATER, "max_tokens")


@pytest.mark.parametrize(
    ("fields", "room"),
    [({"max_tokens": 7}, 1), ({"max_completion_tokens": 7}, 1), ({"max_tokens": None}, 0), ({}, 0)],
)
async def test_a_conversation_truncated_to_the_context_leaves_room_for_an_output_that_is_asked_for(
    http: httpx.AsyncClient, renderer: Renderer, fields: dict[str, Any], room: int
) -> None:
    long = {**hello(truncate_prompt_tokens=-1, **fields), "messages": say("word " * renderer.max_model_len)["messages"]}
    response = await post(http, CHAT, long)
    if room:
        assert response.status_code == 200, response.text
        assert len(response.json()["token_ids"]) == renderer.max_model_len - 1
        assert response.json()["sampling_params"]["max_tokens"] == 1
    else:
        assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")


async def test_a_completion_truncated_to_the_context_leaves_room_for_its_output(
    http: httpx.AsyncClient, renderer: Renderer
) -> None:
    prompts = [[1] * (renderer.max_model_len + 1), "word " * renderer.max_model_len]
    for prompt in prompts:
        (answer,) = (await post(http, TEXT, {"prompt": prompt, "truncate_prompt_tokens": -1})).json()
        assert len(answer["token_ids"]) == renderer.max_model_len - 1
        assert answer["sampling_params"]["max_tokens"] == 1


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize", "/v1/chat/completions/derender"])
async def test_a_wrong_method_and_a_wrong_content_type(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code == 405
    response = await http.post(path, content=b"{}", headers={"content-type": "text/plain"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, SCHEMA)

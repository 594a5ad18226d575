"""The routes over a real renderer in this process; what an engine would say is scripted."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import msgpack
import numpy as np
import pybase64
import pytest
from fastapi import FastAPI

from deployments.admission import Lane
from deployments.backends import LocalBackend
from deployments.calls import Delta, Event, GenerateCall, Served, Started
from deployments.config import GreenroomConfig, LaneConfig
from deployments.front import Front
from deployments.http.routes import http_app
from deployments.operations import Operations
from deployments.records import Record
from deployments.rendering import RenderOnly
from deployments.tier import Operation
from renderer.errors import EngineError, RequestError
from renderer.renderer import Renderer
from renderer.wire import WireLimits, decode_base64
from tests.stack.helpers import TOKENS, about, picture

CONFIG = GreenroomConfig.model_validate(
    {
        "model": "demo/model",
        "served_model_names": ["demo", "alias"],
        "renderer": {"media_threads": 1, "render_threads": 1},
        "router": {"max_body_bytes": 200_000},
    }
)
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
STARTED = Started(Served("engine", "e", {"render": 0.001}), 10, 0)


class Scripted(LocalBackend):
    """Renders here, and plays the events, then the error, of a test for every generation."""

    script: tuple[Event, ...] = ()
    error: Exception | None = None

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Event]:
        for event in self.script:
            yield event
        if self.error is not None:
            raise self.error


@pytest.fixture
def backend(renderer: Renderer) -> Scripted:
    return Scripted(RenderOnly(renderer, Record("render")))


@pytest.fixture
async def http(backend: Scripted) -> AsyncIterator[httpx.AsyncClient]:
    app = http_app(Operations(Front(CONFIG, backend), Record("router")))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://greenroom") as client:
        yield client


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_only_json_is_taken(http: httpx.AsyncClient, content_type: str) -> None:
    response = await http.post("/tokenize", content=b"{}", headers={"content-type": content_type})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "Bad Request")


async def test_parameters_of_the_content_type_are_ignored(http: httpx.AsyncClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await http.post("/tokenize", content=b'{"prompt": "a"}', headers=headers)).status_code == 200


async def test_a_body_beyond_the_limit_is_refused(http: httpx.AsyncClient) -> None:
    response = await http.post("/tokenize", json={"prompt": "a" * 200_000})
    assert response.status_code == 413
    assert "200000 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize("model", ["demo", "alias", "", None])
async def test_every_served_name_and_none_are_the_model(http: httpx.AsyncClient, model: str | None) -> None:
    response = await http.post("/v1/chat/completions/render", json={**HELLO, "model": model})
    assert response.status_code == 200
    assert response.json()["model"] == model or model is None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_another_model_is_a_404(http: httpx.AsyncClient, path: str) -> None:
    body = {"model": "demo/model", "messages": HELLO["messages"], "prompt": "a", "tokens": [1]}
    fields = {"/tokenize": ("messages",), "/detokenize": ("tokens",), "/v1/completions": ("prompt",)}
    chosen = {name: body[name] for name in ("model", *fields.get(path, ("messages",)))}
    error = (await http.post(path, json=chosen)).json()["error"]
    assert (error["code"], error["type"], error["param"]) == (404, "NotFoundError", "model")


async def test_a_wrong_method_and_an_unknown_path_are_answered_in_openais_form(http: httpx.AsyncClient) -> None:
    wrong, unknown = await http.get("/tokenize"), await http.get("/v1/nothing")
    assert (wrong.status_code, wrong.json()["error"]["code"], wrong.headers["allow"]) == (405, 405, "POST")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")


async def test_a_rendered_chat_is_a_generate_request(http: httpx.AsyncClient, renderer: Renderer) -> None:
    body = {
        "messages": about(picture(0), picture(1)),
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": "salt",
        "priority": 3,
        "request_id": "mine",
        "stop": "END",
        "max_tokens": 16,
    }
    answer = (await http.post("/v1/chat/completions/render", json=body)).json()
    assert answer["request_id"] == "chatcmpl-mine"
    assert (answer["stream"], answer["cache_salt"], answer["priority"]) == (True, "salt", 3)
    assert answer["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}
    assert (answer["output_mode"], answer["content_parts"], answer["token_offsets"]) == ("tokens", None, None)
    sampling = answer["sampling_params"]
    assert (sampling["max_tokens"], sampling["stop"], sampling["output_kind"]) == (16, ["END"], 1)
    features = answer["features"]
    for place, encoded in zip(features["mm_placeholders"]["image"], features["kwargs_data"]["image"], strict=True):
        item = decode_base64(encoded, WireLimits())
        assert item.tensors["pixel_values"].shape == (4 * TOKENS, 1176)
        assert place["length"] == TOKENS
        assert set(answer["token_ids"][place["offset"] : place["offset"] + TOKENS]) == {766}
    grid = decode_base64(features["mm_metadata"]["image"][0], WireLimits())
    assert np.array_equal(grid.tensors["image_grid_thw"], [1, 16, 16])
    assert len(set(features["mm_hashes"]["image"])) == 2


async def test_text_has_no_features_and_several_prompts_are_numbered(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/completions/render", json={"prompt": ["a", "b"], "request_id": "r"})).json()
    assert [request["request_id"] for request in answer] == ["cmpl-r-0", "cmpl-r-1"]
    assert [request["features"] for request in answer] == [None, None]
    (only,) = (await http.post("/v1/completions/render", json={"prompt": [5, 6], "request_id": "r"})).json()
    assert (only["request_id"], only["token_ids"]) == ("cmpl-r", [5, 6])


async def test_tokens_have_their_spelling_on_request(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/tokenize", json={"prompt": "Hello there", "return_token_strs": True})).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert "".join(answer["token_strs"]).replace("Ġ", " ") == "Hello there"
    assert answer["max_model_len"] == 4096
    back = (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back == {"prompt": "Hello there"}


async def test_an_error_in_a_stream_that_has_begun_is_its_last_event_and_counted(
    http: httpx.AsyncClient, backend: Scripted, counted: Counter[str]
) -> None:
    backend.script = (STARTED, Delta(0, "Hel", (1,)))
    backend.error = EngineError("the engine failed on this request")
    response = await http.post("/v1/chat/completions", json={**HELLO, "stream": True})
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert response.status_code == 200
    assert json.loads(events[0])["choices"][0]["delta"]["content"] == "Hel"
    assert json.loads(events[1])["error"]["message"] == "the engine failed on this request"
    assert events[2:] == ["[DONE]"]
    assert counted["broken_streams"] == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_token_is_a_status(
    http: httpx.AsyncClient, backend: Scripted, stream: bool
) -> None:
    backend.error = RequestError("refused", "field")
    response = await http.post("/v1/chat/completions", json={**HELLO, "stream": stream})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "field")


async def test_a_fault_of_ours_tells_nothing_of_itself(
    http: httpx.AsyncClient, backend: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    backend.error = KeyError("/secret/path")
    response = await http.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret" in caplog.text


async def test_generated_headers_name_the_stages(http: httpx.AsyncClient, backend: Scripted) -> None:
    backend.script = (STARTED, Delta(0, "Hello", (1,), "stop"))
    response = await http.post("/v1/chat/completions", json=HELLO)
    assert (response.headers["x-greenroom-tier"], response.headers["x-greenroom-replica"]) == ("engine", "e")
    assert response.headers["server-timing"].startswith("render;dur=1.00, total;dur=")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**HELLO, "n": 129, "temperature": 1}, "n"),
        ({**HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
async def test_what_generation_does_not_do_is_refused(http: httpx.AsyncClient, body: Any, param: str) -> None:
    response = await http.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_tools_reach_the_template_and_are_generated_without_on_request(
    http: httpx.AsyncClient, backend: Scripted
) -> None:
    backend.script = (STARTED, Delta(0, "Hello", (1,), "stop"))
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    for path, choice in (("/v1/chat/completions/render", "auto"), ("/v1/chat/completions", "none")):
        response = await http.post(path, json={**HELLO, "tools": tools, "tool_choice": choice})
        assert response.status_code == 200, response.text


async def test_large_bodies_are_parsed_beside_the_event_loop(http: httpx.AsyncClient) -> None:
    noise = np.random.default_rng(0).bytes(100_000)
    url = "data:;base64," + pybase64.b64encode_as_string(picture(0).png + noise)
    content = [{"type": "image_url", "image_url": {"url": url}}]
    response = await http.post("/tokenize", json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions/render", {"messages": about(picture(0), picture(1)), "request_id": "mine"}),
        ("/v1/chat/completions/render", {**HELLO, "request_id": "mine"}),
        ("/v1/completions/render", {"prompt": ["one", "two"], "request_id": "mine"}),
    ],
)
async def test_messagepack_is_the_same_answer_with_bytes_in_the_place_of_base64(
    http: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    text = await http.post(path, json=body)
    packed = await http.post(path, json=body, headers={"Accept": "application/x-msgpack"})
    assert (text.headers["content-type"], text.headers["vary"]) == ("application/json", "Accept")
    assert packed.headers["content-type"] == "application/x-msgpack"
    unpacked, expected = msgpack.unpackb(packed.content), text.json()
    for answer in expected if isinstance(expected, list) else [expected]:
        for name in ("kwargs_data", "mm_metadata"):
            if answer["features"] is not None:
                own = answer["features"][name]["image"]
                answer["features"][name]["image"] = [pybase64.b64decode(item) for item in own]
    assert unpacked == expected


async def test_errors_are_json_whatever_is_accepted(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions/render", json={}, headers={"Accept": "application/x-msgpack"})
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")


def requests_under_way(front: Front, lane: Lane) -> int:
    return int(front.under_way()[f"{lane}_requests"])


@pytest.mark.parametrize(
    ("path", "body", "lane"),
    [
        ("/v1/chat/completions/render", {"messages": about(picture(0))}, Lane.RENDER),
        ("/tokenize", HELLO, Lane.RENDER),
        ("/v1/chat/completions", {**HELLO, "stream": True}, Lane.GENERATION),
    ],
)
async def test_a_request_keeps_its_place_until_its_answer_is_sent_or_its_client_has_left(
    backend: Scripted, path: str, body: dict[str, Any], lane: Lane
) -> None:
    front = Front(CONFIG, backend)
    app = http_app(Operations(front, Record("router")))
    backend.script = (STARTED, Delta(0, "Hi", (1,), finish_reason="stop"))
    content = json.dumps(body).encode()
    for leaves in (False, True):
        sending, go_on = asyncio.Event(), asyncio.Event()
        asking = asyncio.create_task(asked(app, path, content, sending, go_on))
        await asyncio.wait_for(sending.wait(), 30)
        assert requests_under_way(front, lane) == 1
        if leaves:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        else:
            go_on.set()
            await asking
        assert requests_under_way(front, lane) == 0


async def asked(app: FastAPI, path: str, content: bytes, sending: asyncio.Event, go_on: asyncio.Event) -> None:
    """A client that takes nothing of the answer but its head before it is told to."""
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sending.set()
            await go_on.wait()

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"", "headers": headers}
    await app({**scope, "http_version": "1.1", "scheme": "http", "extensions": {}}, receive, send)


async def test_a_body_that_nobody_announced_counts_while_it_is_read(backend: Scripted) -> None:
    router = CONFIG.router.model_copy(
        update={"admission": CONFIG.router.admission.model_copy(update={"render": LaneConfig(media_bytes=50_000)})}
    )
    front = Front(CONFIG.model_copy(update={"router": router}), backend)
    app = http_app(Operations(front, Record("router")))

    async def chunks(count: int) -> AsyncGenerator[bytes]:
        for _ in range(count):
            yield b" " * 10_000

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://greenroom") as client:
        headers = {"Content-Type": "application/json"}
        with front.admit(Operation.TOKENIZE, 20_000):
            response = await client.post("/tokenize", content=chunks(9), headers=headers)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert front.under_way()["render_media_bytes"] == 20_000
            response = await client.post("/tokenize", content=chunks(2), headers=headers)
            assert response.status_code == 400, "it is blank"

"""RemoteEngine against a small real HTTP server that speaks `/inference/v1/generate`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn import Config, Server

from engine.protocol import EngineOutput, SamplingParams
from engine.remote import RemoteEngine
from engine.remote_config import RemoteEngineConfig
from renderer.errors import (
    CacheMissError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineStartingError,
    RequestError,
)
from renderer.prompt import PlaceholderRange, RenderedPrompt
from renderer.wire import WireLimits, decode_base64
from tests.engine.builders import EVERY_PARAMETER, Picture, Text, lab

TOKENS = (11, 12, 13, 14)
PARAMS = SamplingParams(max_tokens=4, temperature=0.0)


class FakeServer:
    """Answers every request with `TOKENS`, less those that end the prompt already; notes what it is asked."""

    def __init__(self, behaviour: str = "well") -> None:
        self.behaviour = behaviour
        self.max_model_len = 512
        self.bodies: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.is_healthy = True
        self.asked = 0
        self.held = asyncio.Event()
        self.left = asyncio.Event()
        self.url = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/health", self._health),
                Route("/inference/v1/generate", self._generate, methods=["POST"]),
                Route("/inference/v1/abort_requests", self._abort, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "m", "max_model_len": self.max_model_len}]})

    async def _health(self, request: Request) -> Response:
        self.asked += 1
        if self.behaviour == "silent":
            await self.held.wait()
        return Response(status_code=200 if self.is_healthy else 503)

    async def _abort(self, request: Request) -> Response:
        self.aborted += (await request.json())["request_ids"]
        self.held.set()
        return Response()

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        if "token_ids" not in body:
            return self._probed()
        self.bodies.append(body)
        match self.behaviour:
            case "refuses":
                return _error(400, "top_p is wrong", "top_p")
            case "fails" | "dies":
                self.is_healthy = self.behaviour == "fails"
                return _error(500, "Internal server error")
            case "overloaded":
                return _error(503, "too many requests")
            case "waits":
                await self._until_left(request)
        return StreamingResponse(self._events(body, request), media_type="text/event-stream")

    async def _until_left(self, request: Request) -> None:
        """Nothing comes of a request before its client has gone, as vLLM itself does it."""
        while not await request.is_disconnected():  # noqa: ASYNC110  # starlette tells nobody
            await asyncio.sleep(0.01)
        self.left.set()

    def _probed(self) -> Response:
        return _error(403, "disabled") if self.behaviour == "closed" else _error(400, "token_ids is missing")

    async def _events(self, body: dict[str, Any], request: Request) -> AsyncIterator[bytes]:
        if self.behaviour == "prefills":
            await self._until_left(request)
        left = [token for token in TOKENS if token not in body["token_ids"]][: body["sampling_params"]["max_tokens"]]
        for index, token in enumerate(left):
            is_last = index == len(left) - 1
            if self.behaviour == "breaks" and index == 2:
                raise ConnectionError("as if the process had died")
            if self.behaviour == "in-stream error" and index == 2:
                yield _event({"error": {"message": "it failed", "type": "x", "param": None, "code": 500}})
                return
            if self.behaviour == "holds" and index == 1:
                await self.held.wait()
                yield _choice([], "abort")
                return
            yield _choice([token], "length" if is_last else None)
        usage = {"prompt_tokens": 1, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 16}}
        yield _event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _choice(token_ids: list[int], reason: str | None) -> bytes:
    content = [
        {
            "token_id": token,
            "logprob": -0.5,
            "rank": 1,
            "top_logprobs": [{"token_id": token, "logprob": -0.5, "rank": 1}],
        }
        for token in token_ids
    ]
    choice = {"index": 0, "finish_reason": reason, "stop_reason": None, "token_ids": token_ids}
    return _event({"usage": None, "choices": [choice | {"logprobs": {"content": content}}]})


def _error(status: int, message: str, param: str | None = None) -> Response:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status)


@contextlib.asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[FakeServer]:
    uvicorn = Server(Config(server.app(), host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    task = asyncio.create_task(uvicorn.serve())
    async with asyncio.timeout(20):
        while not uvicorn.started:  # noqa: ASYNC110  # uvicorn tells nobody
            await asyncio.sleep(0.01)
    server.url = f"http://127.0.0.1:{uvicorn.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        server.held.set()
        uvicorn.should_exit = True
        await task


def config_of(*urls: str, **options: Any) -> RemoteEngineConfig:
    model = str(lab("qwen2_5_vl").path)
    config = {"backend": "remote", "model": model, "urls": urls, "start_timeout_s": 5, **options}
    return RemoteEngineConfig.model_validate(config)


@contextlib.asynccontextmanager
async def engine_of(*urls: str, **options: Any) -> AsyncIterator[RemoteEngine]:
    engine = RemoteEngine(config_of(*urls, **options))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


async def ask(
    engine: RemoteEngine,
    prompt: RenderedPrompt | None = None,
    params: SamplingParams = PARAMS,
    prior: tuple[int, ...] = (),
) -> list[EngineOutput]:
    outputs = engine.generate(prompt or RenderedPrompt((1, 2, 3)), params, request_id="r", prior_output_ids=prior)
    return [output async for output in outputs]


def ids_of(outputs: list[EngineOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


async def test_tokens_come_as_the_server_streams_them() -> None:
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        outputs = await ask(engine, RenderedPrompt((1,) * 40), dataclasses.replace(PARAMS, logprobs=1))
        assert ids_of(outputs) == TOKENS
        assert (outputs[-1].finish_reason, outputs[-1].num_cached_tokens) == ("length", 16)
        assert outputs[0].logprobs[0].top == ((TOKENS[0], -0.5),)
        assert engine.max_model_len == 512
        stats = await engine.stats()
        assert (stats.requests, stats.output_tokens, stats.running, stats.aborted) == (1, 4, 0, 0)


async def test_a_request_says_everything_that_a_default_could_change() -> None:
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        await ask(engine, RenderedPrompt((1, 2), cache_salt="tenant"))
        body = server.bodies[0]
        assert body["sampling_params"]["max_tokens"] == 4
        assert (body["cache_salt"], body["stream"], body["output_mode"]) == ("tenant", True, "tokens")


async def test_every_parameter_is_told_by_its_name() -> None:
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        await ask(engine, params=EVERY_PARAMETER)
    told = server.bodies[0]["sampling_params"]
    for field in dataclasses.fields(SamplingParams):
        value = getattr(EVERY_PARAMETER, field.name)
        assert value != field.default, field.name
        if field.name == "structured":
            assert told["structured_outputs"] == {"json": value}
        else:
            assert told[field.name] == (list(value) if isinstance(value, tuple) else value), field.name


async def test_items_cross_whole_every_time() -> None:
    prompt = lab("qwen2_5_vl").prompt(Text(3), Picture(1), Text(2))
    grid = (prompt.items[0].tensors or {})["image_grid_thw"].tolist()
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        await ask(engine, prompt)
        await ask(engine, prompt)
        for body in server.bodies:
            features = body["features"]
            decoded = decode_base64(features["kwargs_data"]["image"][0], WireLimits())
            assert decoded.tensors["image_grid_thw"].tolist() == grid
            place = prompt.items[0].range
            assert features["mm_placeholders"]["image"] == [{"offset": place.offset, "length": place.length}]
            assert features["mm_hashes"]["image"] == [prompt.items[0].cache_key]
        assert (await engine.stats()).tensors_received == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_float_pixels_cross_in_the_type_that_the_servers_compute_in(dtype: str) -> None:
    prompt = lab("llava").prompt(Text(3), Picture(1), Text(2))
    pixels = torch.from_numpy((prompt.items[0].tensors or {})["pixel_values"])
    assert pixels.dtype == torch.float32
    fake = FakeServer()
    fake.max_model_len = 1024
    async with (
        serving(fake) as server,
        engine_of(server.url, model=str(lab("llava").path), dtype=dtype) as engine,
    ):
        await ask(engine, prompt)
        decoded = decode_base64(server.bodies[0]["features"]["kwargs_data"]["image"][0], WireLimits())
        (sent,) = decoded.tensors.values()
        assert torch.equal(torch.from_numpy(np.array(sent)), pixels.to(getattr(torch, dtype)).float())


async def test_an_item_without_tensors_is_a_miss() -> None:
    prompt = lab("qwen2_5_vl").prompt(Picture(1)).layout()
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        with pytest.raises(CacheMissError):
            await ask(engine, prompt)
        assert server.bodies == []


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ((False, True, True, False), {"offset": 1, "length": 2}),
        ((True, False, True, True), None),
    ],
)
async def test_only_tokens_with_embeddings_in_one_piece_can_be_told(
    mask: tuple[bool, ...], told: dict[str, int] | None
) -> None:
    prompt = lab("qwen2_5_vl").prompt(Picture(1))
    item = dataclasses.replace(prompt.items[0], range=PlaceholderRange(0, len(mask), mask))
    prompt = dataclasses.replace(prompt, items=(item,))
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        if told is None:
            with pytest.raises(RequestError, match="one piece"):
                await ask(engine, prompt)
        else:
            await ask(engine, prompt)
            assert server.bodies[0]["features"]["mm_placeholders"]["image"] == [told]


async def test_greedy_output_goes_on_after_what_was_streamed() -> None:
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        assert ids_of(await ask(engine, prior=TOKENS[:3])) == TOKENS[3:]
        assert server.bodies[0]["token_ids"] == [1, 2, 3, *TOKENS[:3]]
        assert server.bodies[0]["sampling_params"]["max_tokens"] == 1


async def test_seeded_output_is_generated_again() -> None:
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        seeded = SamplingParams(max_tokens=4, seed=1)
        assert ids_of(await ask(engine, params=seeded, prior=TOKENS[:3])) == TOKENS[3:]
        assert server.bodies[0]["token_ids"] == [1, 2, 3]


async def test_requests_spread_over_the_servers() -> None:
    async with (
        serving(FakeServer()) as first,
        serving(FakeServer()) as second,
        engine_of(first.url, second.url) as engine,
    ):
        for _ in range(6):
            await ask(engine)
        assert (len(first.bodies), len(second.bodies)) == (3, 3)


async def test_a_server_that_is_gone_is_passed_over() -> None:
    async with serving(FakeServer()) as server:
        async with serving(FakeServer()) as gone:
            pass
        async with engine_of(gone.url, server.url) as engine:
            for _ in range(3):
                assert ids_of(await ask(engine)) == TOKENS
            await engine.health()


async def test_one_server_that_is_well_is_enough_and_is_not_asked_for_every_request() -> None:
    async with serving(FakeServer("silent")) as silent, serving(FakeServer()) as server:
        engine = RemoteEngine(config_of(silent.url, server.url, connect_timeout_s=30))
        async with asyncio.timeout(20):
            for _ in range(3):
                await engine.health()
        assert server.asked == 1
        silent.held.set()
        await engine.close()


@pytest.mark.parametrize("behaviour", ["overloaded", "dies"])
async def test_a_server_that_cannot_is_passed_over(behaviour: str) -> None:
    async with (
        serving(FakeServer(behaviour)) as first,
        serving(FakeServer()) as second,
        engine_of(first.url, second.url) as engine,
    ):
        assert ids_of(await ask(engine)) == TOKENS
        assert ids_of(await ask(engine)) == TOKENS


async def test_without_any_server_nothing_was_submitted() -> None:
    async with serving(FakeServer()) as server:
        context = engine_of(server.url)
        engine = await context.__aenter__()
    with pytest.raises(EngineStartingError):
        await ask(engine)
    with pytest.raises(EngineDeadError):
        await engine.health()
    await engine.close()


async def test_a_lost_connection_may_be_continued_elsewhere() -> None:
    async with serving(FakeServer("breaks")) as server, engine_of(server.url) as engine:
        tokens: list[int] = []
        outputs = engine.generate(RenderedPrompt((1, 2)), PARAMS, request_id="r")
        with pytest.raises(EngineDeadError):
            await _read_into(tokens, outputs)
        assert tuple(tokens) == TOKENS[:2]


async def _read_into(tokens: list[int], outputs: Any) -> None:
    async for output in outputs:
        tokens += output.token_ids


@pytest.mark.parametrize("behaviour", ["fails", "in-stream error"])
async def test_a_failure_of_one_request_is_its_own(behaviour: str) -> None:
    async with serving(FakeServer(behaviour)) as server, engine_of(server.url) as engine:
        with pytest.raises(EngineError) as raised:
            await ask(engine)
        assert not isinstance(raised.value, EngineDeadError)


async def test_a_refusal_names_the_field() -> None:
    async with serving(FakeServer("refuses")) as server, engine_of(server.url) as engine:
        with pytest.raises(RequestError) as raised:
            await ask(engine)
        assert raised.value.param == "top_p"


async def test_a_request_beyond_the_servers_length_is_refused() -> None:
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        with pytest.raises(ContextLengthError):
            await ask(engine, params=dataclasses.replace(PARAMS, max_tokens=510))


async def test_abort_reaches_the_server_that_has_the_request() -> None:
    async with serving(FakeServer("holds")) as server, engine_of(server.url) as engine:
        reasons = []
        async for output in engine.generate(RenderedPrompt((1, 2)), PARAMS, request_id="r"):
            reasons.append(output.finish_reason)
            await engine.abort("r")
        assert reasons == [None, "abort"]
        assert server.aborted[0] == "generate-tokens-r"
        assert (await engine.stats()).aborted == 1


@pytest.mark.parametrize("behaviour", ["waits", "prefills"])
async def test_an_abort_before_the_first_output_ends_the_request_here_and_at_its_server(behaviour: str) -> None:
    async with serving(FakeServer(behaviour)) as server, engine_of(server.url) as engine:
        asked = asyncio.create_task(ask(engine))
        async with asyncio.timeout(20):
            while not server.bodies:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await engine.abort("r")
            assert [output.finish_reason for output in await asked] == ["abort"]
            if behaviour == "waits":
                await server.left.wait()
        stats = await engine.stats()
        assert (stats.aborted, stats.running) == (1, 0)
        assert not engine._relay.requests._by_id
        assert not engine._placed


async def test_an_abort_at_the_very_beginning_is_not_lost() -> None:
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        asked = asyncio.create_task(ask(engine))
        await asyncio.sleep(0)
        await engine.abort("r")
        assert [output.finish_reason for output in await asked] == ["abort"]
        assert server.bodies == []


async def test_what_was_made_before_an_abort_came_is_left_out() -> None:
    async with serving(FakeServer()) as server, engine_of(server.url) as engine:
        reasons = []
        async for output in engine.generate(RenderedPrompt((1, 2)), PARAMS, request_id="r"):
            reasons.append(output.finish_reason)
            await engine.abort("r")
        assert reasons == [None, "abort"]


async def test_a_server_that_ends_a_request_by_itself_is_going_down() -> None:
    async with serving(FakeServer("holds")) as server, engine_of(server.url) as engine:
        server.held.set()
        tokens: list[int] = []
        with pytest.raises(EngineDeadError):
            await _read_into(tokens, engine.generate(RenderedPrompt((1, 2)), PARAMS, request_id="r"))
        assert tuple(tokens) == TOKENS[:1]


async def test_a_server_without_token_routes_is_found_at_start() -> None:
    async with serving(FakeServer("closed")) as server:
        with pytest.raises(ConfigError, match="enable-scale-out"):
            async with engine_of(server.url):
                pass


async def test_another_model_is_found_at_start() -> None:
    async with serving(FakeServer()) as server:
        with pytest.raises(ConfigError, match="serves m"):
            async with engine_of(server.url, served_model_name="other"):
                pass


def test_addresses_are_checked() -> None:
    for urls in ((), ("ftp://x",), ("http://x", "http://x")):
        with pytest.raises(ValueError, match="urls"):
            RemoteEngineConfig.model_validate({"backend": "remote", "model": "m", "urls": urls})

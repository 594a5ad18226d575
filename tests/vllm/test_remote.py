"""RemoteEngine against vLLM's own servers: answers, aborts, readers that leave, a server that dies."""

from __future__ import annotations

import asyncio
import base64
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from engine.protocol import EngineOutput, SamplingParams
from engine.remote import RemoteEngine
from engine.remote_config import RemoteEngineConfig
from renderer.config import RendererConfig
from renderer.errors import CacheMissError, ConfigError, EngineDeadError, NotSupportedError
from renderer.prompt import RenderedPrompt
from renderer.renderer import Renderer
from tests.goldens.peer import peer
from tests.vllm.conftest import GREEDY, chat, ids_of, png
from tests.vllm.published import published
from tests.vllm.servers import figure, kill_server, tokens_made, two_servers

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = published("qwen2_5_vl")
LONG = replace(GREEDY, max_tokens=1000)


@dataclass(frozen=True)
class Far:
    """A renderer, and an engine of two servers."""

    renderer: Renderer
    engine: RemoteEngine
    urls: tuple[str, ...]

    async def render(self, text: str, *pictures: int) -> RenderedPrompt:
        pool = self.renderer.request_pool
        prompt: RenderedPrompt = await pool.run(self.renderer.render_chat, chat(text, *pictures), True)
        return prompt

    async def ask(
        self, prompt: RenderedPrompt, params: SamplingParams = GREEDY, prior: tuple[int, ...] = ()
    ) -> list[EngineOutput]:
        outputs = self.engine.generate(prompt, params, request_id="r", prior_output_ids=prior)
        return [output async for output in outputs]


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, ...]]:
    with two_servers(MODEL) as urls:
        yield urls


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def far(servers: tuple[str, ...]) -> AsyncIterator[Far]:
    async with opened(MODEL, servers) as far:
        yield far


@asynccontextmanager
async def opened(model: Path, servers: tuple[str, ...]) -> AsyncIterator[Far]:
    config = {"backend": "remote", "model": str(model), "urls": servers, "dtype": "float32"}
    engine = RemoteEngine(RemoteEngineConfig.model_validate(config))
    renderer = Renderer(RendererConfig(model=str(model), dtype="float32"), engine.sender_cache)
    try:
        await engine.start()
        yield Far(renderer, engine, servers)
    finally:
        renderer.close()
        await engine.close()


async def own_answer(url: str, text: str, *pictures: int) -> tuple[int, ...]:
    """Greedy tokens that the server answers to a chat."""
    urls = ["data:image/png;base64," + base64.b64encode(png(seed)).decode() for seed in pictures]
    parts = [*({"type": "image_url", "image_url": {"url": each}} for each in urls), {"type": "text", "text": text}]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "repetition_penalty": 1.0,
        "max_tokens": GREEDY.max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
    return tuple(answer["choices"][0]["token_ids"])


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110  # the servers tell nobody
            await asyncio.sleep(0.1)


async def idle(far: Far) -> bool:
    return not any([await figure(url, "vllm:num_requests_running") for url in far.urls])


@pytest.mark.parametrize("pictures", [(), (1,), (2, 3), (4, 4, 5)])
async def test_tokens_are_those_of_the_servers_own_chat(far: Far, pictures: tuple[int, ...]) -> None:
    ours = ids_of(await far.ask(await far.render("What is it?", *pictures)))
    assert ours == await own_answer(far.urls[0], "What is it?", *pictures)
    assert len(ours) == GREEDY.max_tokens


async def test_pixels_in_floats_cross_as_they_are() -> None:
    """A family whose servers do not normalise on the device: the others' pixels are bytes."""
    model = published("llava")
    with peer(Path(sys.prefix), model, engine=True, options=("--dtype", "float32")) as url:
        async with opened(model, (url,)) as far:
            prompt = await far.render("What is it?", 1, 2)
            assert {item.tensors["pixel_values"].dtype for item in prompt.items if item.tensors} == {np.dtype("f4")}
            answers = [ids_of(await far.ask(await far.render("What is it?", *seen))) for seen in ((1,), (2,), (1, 2))]
            assert answers == [await own_answer(url, "What is it?", *seen) for seen in ((1,), (2,), (1, 2))]
            assert len(set(answers)) == 3


async def test_requests_spread_over_the_servers(far: Far) -> None:
    before = [await tokens_made(url) for url in far.urls]
    prompt = await far.render("What is it?", 1)
    answers = {ids_of(await far.ask(prompt)) for _ in range(4)}
    after = [await tokens_made(url) for url in far.urls]
    assert len(answers) == 1
    assert [end - begin for begin, end in zip(before, after, strict=True)] == [2 * GREEDY.max_tokens] * 2


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        replace(GREEDY, temperature=1.0, seed=5),
        replace(GREEDY, presence_penalty=1.0),
        replace(GREEDY, temperature=1.0, seed=5, frequency_penalty=0.5),
    ],
)
async def test_output_goes_on_after_what_another_streamed(far: Far, params: SamplingParams) -> None:
    prompt = await far.render("Go on", 8)
    whole = ids_of(await far.ask(prompt, params))
    rest = await far.ask(prompt, params, whole[:5])
    assert ids_of(rest) == whole[5:]
    assert rest[-1].finish_reason == "length"


async def test_logprobs_and_stop_tokens_are_the_servers(far: Far) -> None:
    prompt = await far.render("What?")
    outputs = await far.ask(prompt, replace(GREEDY, logprobs=3))
    entries = [entry for output in outputs for entry in output.logprobs]
    assert [entry.token_id for entry in entries] == list(ids_of(outputs))
    assert all(entry.rank == 1 and len(entry.top) == 3 for entry in entries)
    stop = ids_of(outputs)[4]
    first = ids_of(outputs).index(stop)
    stopped = await far.ask(prompt, replace(GREEDY, stop_token_ids=(stop,)))
    assert ids_of(stopped) == ids_of(outputs)[: first + 1]
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", stop)


async def test_a_schema_is_followed(far: Far) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    params = SamplingParams(max_tokens=200, temperature=1.0, seed=1, structured=schema)
    outputs = await far.ask(await far.render("Number?"), params)
    text = far.renderer.detokenize(ids_of(outputs))
    assert re.match(r'\s*\{\s*"n"\s*:\s*(1|22)?', text), text


async def test_an_aborted_request_ends_with_that_reason_and_at_the_server(far: Far) -> None:
    """However fast the servers are: what was made before the abort came is left out."""
    before = [await tokens_made(url) for url in far.urls]
    prompt = await far.render("Long")
    early = asyncio.create_task(far.ask(prompt, LONG))
    while not far.engine._relay.requests._by_id:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await far.engine.abort("r")
    assert [output.finish_reason for output in await early] == ["abort"]
    reasons = []
    async for output in far.engine.generate(prompt, LONG, request_id="long"):
        reasons.append(output.finish_reason)
        await far.engine.abort("long")
    assert reasons[-1] == "abort"
    await until(lambda: idle(far))
    after = [await tokens_made(url) for url in far.urls]
    assert sum(after) - sum(before) < 2 * LONG.max_tokens


async def test_a_request_whose_reader_leaves_ends_at_the_server(far: Far) -> None:
    async with aclosing(far.engine.generate(await far.render("Long"), LONG, request_id="left")) as outputs:
        async for _ in outputs:
            break
    before = [await tokens_made(url) for url in far.urls]
    await until(lambda: idle(far))
    after = [await tokens_made(url) for url in far.urls]
    assert sum(after) - sum(before) < LONG.max_tokens / 2


async def test_an_item_without_tensors_is_a_miss_that_no_server_sees(far: Far) -> None:
    prompt = (await far.render("What?", 1)).layout()
    with pytest.raises(CacheMissError):
        await far.ask(prompt)
    await far.engine.health()


async def test_caches_are_emptied_only_where_the_servers_let_themselves_be_told(far: Far) -> None:
    with pytest.raises(NotSupportedError):
        await far.engine.reset_cache()


async def test_a_server_of_another_model_is_refused_at_start(servers: tuple[str, ...]) -> None:
    config = {"backend": "remote", "model": str(MODEL), "urls": servers[:1], "served_model_name": "another"}
    engine = RemoteEngine(RemoteEngineConfig.model_validate(config))
    with pytest.raises(ConfigError, match="another"):
        await engine.start()
    await engine.close()


async def test_a_server_that_dies_ends_its_requests_and_the_other_goes_on(far: Far) -> None:
    prompt = await far.render("What is it?", 1)
    whole = ids_of(await far.ask(prompt, LONG))
    tokens: list[int] = []
    with pytest.raises(EngineDeadError):
        await _killed_while_streaming(far, prompt, tokens)
    assert tuple(tokens) == whole[: len(tokens)]
    rest = await far.ask(prompt, LONG, tuple(tokens))
    assert (*tokens, *ids_of(rest)) == whole
    await far.engine.health()
    for _ in range(4):
        assert ids_of(await far.ask(prompt)) == whole[: GREEDY.max_tokens]


async def _killed_while_streaming(far: Far, prompt: RenderedPrompt, tokens: list[int]) -> None:
    async for output in far.engine.generate(prompt, LONG, request_id="killed"):
        if not tokens:
            (server,) = (server for server in far.engine._pool.servers if server.in_flight)
            kill_server(server.url)
        tokens += output.token_ids

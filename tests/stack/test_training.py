"""Other weights for the running application, through its handle: for all replicas, and for those that start later."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from deployments.calls import ReplicaReport
from deployments.client import Client, user
from renderer.errors import RequestError
from renderer.prompt import RenderedPrompt
from tests.engine.builders import Lab, with_other_weights
from tests.stack.helpers import Application, about, picture, wait_until

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
TEXT = (300, 301, 302, 303, 304)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_other_weights(Path("demo/model"), tmp_path_factory.mktemp("training") / "other")


@pytest.fixture
def app(whole: Application) -> Application:
    return whole


@pytest_asyncio.fixture
async def client(app: Application) -> AsyncIterator[Client]:
    """Afterwards all is as it was, whatever happened."""
    client = Client(handle=app.handle)
    yield client
    await client.pause("abort")
    await client.reload(None, "default")
    await client.resume()


async def generated(client: Client, prompt: RenderedPrompt | tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """Greedy tokens and the version of the weights that made them."""
    (choice,) = (await client.generate(prompt, GREEDY)).choices
    assert choice.weight_versions is not None
    return choice.token_ids, choice.weight_versions[0]["version"]


async def test_new_weights_answer_as_generate_does_on_them(client: Client, app: Application, other: Path) -> None:
    await asyncio.to_thread(app.clear)
    prompt = await client.render_chat([user("What colour is the shape?", picture(3).png)])
    text = RenderedPrompt(TEXT)
    with_picture, version = await generated(client, prompt)
    assert version == "default"
    before = await asyncio.to_thread(app.report, "engine")
    await client.pause()
    assert await client.reload(str(other), "step-1") == "step-1"
    await client.resume()
    assert await generated(client, TEXT) == (Lab(other).alone(text, 12), "step-1")
    changed, version = await generated(client, prompt)
    assert (changed != with_picture, version) == (True, "step-1")
    after = await asyncio.to_thread(app.report, "engine")
    assert before.engine is not None
    assert after.engine is not None
    assert after.engine.tensors_received == before.engine.tensors_received
    assert after.engine.encoder_runs == before.engine.encoder_runs + 1
    assert after.weights == "step-1"
    await client.pause()
    await client.reload(None, "default")
    await client.resume()
    assert await generated(client, prompt) == (with_picture, "default")
    assert await generated(client, TEXT) == (Lab(Path("demo/model")).alone(text, 12), "default")


async def test_new_requests_wait_while_generation_is_paused(client: Client, app: Application) -> None:
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as http:
        body = {"messages": about(picture(1), text="Tell me a story."), "max_tokens": 300, "ignore_eos": True}
        running = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await asyncio.to_thread(wait_until, lambda: levels(app) > 0, 20, "it runs")
        await client.pause("wait")
        assert levels_now(await asyncio.to_thread(app.report, "engine")) == 0
        assert (await running).json()["choices"][0]["finish_reason"] == "length"
        waiting = asyncio.create_task(http.post("/v1/chat/completions", json=body | {"request_id": "waiting"}))
        ended = asyncio.create_task(http.post("/v1/chat/completions", json=body | {"request_id": "ended"}))
        await asyncio.to_thread(wait_until, lambda: sequences(app) == 2, 20, "both have arrived")
        assert levels_now(await asyncio.to_thread(app.report, "engine")) == 0
        await client.abort("ended")
        assert (await ended).json()["choices"][0]["finish_reason"] == "abort"
        assert not waiting.done()
        await client.resume()
        assert (await waiting).json()["choices"][0]["finish_reason"] == "length"


async def test_pause_can_abort_what_runs(client: Client, app: Application) -> None:
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as http:
        body = {"messages": about(picture(1)), "max_tokens": 800, "ignore_eos": True}
        running = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await asyncio.to_thread(wait_until, lambda: levels(app) > 0, 20, "it runs")
        await client.pause("abort")
        assert (await running).json()["choices"][0]["finish_reason"] == "abort"


async def test_a_replica_that_starts_later_has_the_weights_too(client: Client, app: Application, other: Path) -> None:
    await client.pause()
    await client.reload(str(other), "step-2")
    await client.resume()
    right = await generated(client, TEXT)
    victim = (await asyncio.to_thread(app.report, "engine")).pid
    os.kill(victim, signal.SIGKILL)
    assert await generated(client, TEXT) == right
    assert right[1] == "step-2"
    assert (await asyncio.to_thread(app.report, "engine")).pid != victim


async def test_weights_that_cannot_be_taken_change_nothing(client: Client, app: Application, tmp_path: Path) -> None:
    right = await generated(client, TEXT)
    with pytest.raises(RequestError, match="pause"):
        await client.reload(str(tmp_path))
    await client.pause()
    with pytest.raises(RequestError):
        await client.reload(str(tmp_path / "nowhere"))
    with pytest.raises(RequestError, match="mode"):
        await client.pause("stop")  # type: ignore[arg-type]
    await client.resume()
    assert await generated(client, TEXT) == right


def levels(app: Application) -> int:
    return levels_now(app.report("engine"))


def levels_now(report: ReplicaReport) -> int:
    assert report.engine is not None
    return report.engine.running + report.engine.waiting


def sequences(app: Application) -> float:
    return app.report("engine").under_way["sequences"]

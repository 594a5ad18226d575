"""What dies, and what the client sees of it. These tests kill processes of the shared cluster, each comes back."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest

from deployments.client import Client, user
from tests.stack.helpers import Application, about, picture, streams_with_a_death, wait_until

STORY = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}


@pytest.fixture
def app(whole: Application) -> Application:
    return whole


def core_of(app: Application) -> psutil.Process:
    """The engine core: the child of the engine replica that runs `engine.core`."""
    children = psutil.Process(app.report("engine").pid).children(recursive=True)
    return next(child for child in children if "engine.core" in " ".join(child.cmdline()))


def test_streams_go_on_when_the_engine_core_is_killed(app: Application) -> None:
    body = {**STORY, "messages": about(picture(0), text="Tell me a story."), "ignore_eos": True, "max_tokens": 400}
    undisturbed = app.post("/v1/chat/completions", body).json()
    restarts = restarts_of(app)
    texts = asyncio.run(streams_with_a_death(app, body, core_of(app).kill))
    expected = undisturbed["choices"][0]["message"]["content"]
    assert texts == [expected] * len(texts)
    wait_until(lambda: restarts_of(app) == restarts + 1, 30, "the core was restarted once")


def test_an_engine_that_restarted_gets_the_tensors_that_its_predecessor_held(app: Application) -> None:
    app.clear()
    body = {"messages": about(picture(1)), "temperature": 0}
    before = app.post("/v1/chat/completions", body).json()
    core_of(app).kill()
    after = app.post("/v1/chat/completions", body)
    assert after.status_code == 200, after.text
    assert after.json()["choices"] == before["choices"]
    assert app.cache("engine", "sender").entries == 1


def test_a_request_is_rendered_elsewhere_when_its_render_replica_dies(app: Application) -> None:
    victim = app.report("render").pid
    before = app.post("/v1/chat/completions/render", {"messages": about(picture(2))}).json()
    os.kill(victim, signal.SIGKILL)
    after = app.post("/v1/chat/completions/render", {"messages": about(picture(2))})
    assert after.status_code == 200, after.text
    assert after.json()["features"] == before["features"]
    wait_until(lambda: [report.pid for report in app.tiers()["render"]] not in ([], [victim]), 30, "a replacement")


async def test_a_stream_goes_on_when_its_engine_replica_is_killed(app: Application) -> None:
    client, options = Client(handle=app.handle), {"ignore_eos": True, "max_tokens": 400, "temperature": 0}
    messages = [user("Tell me a story.", picture(0).png)]
    undisturbed = (await client.chat(messages, **options)).choices[0].message.content
    (engine,) = (await client.health())["engine"]
    text, tokens = "", 0
    async for chunk in client.chat_stream(messages, **options):
        text += chunk.choices[0].delta.get("content", "")
        tokens += 1
        if tokens == 20:
            os.kill(engine.pid, signal.SIGKILL)
    assert text == undisturbed


def restarts_of(app: Application) -> int:
    engine = app.report("engine").engine
    assert engine is not None
    return engine.restarts

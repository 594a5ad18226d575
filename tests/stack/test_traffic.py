"""Many clients, a small cache and clients that leave: no drift, no error, no answer about another's picture."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import httpx
import pytest

from engine.protocol import EngineStats
from tests.stack.helpers import QUESTION, Application, Picture, about, picture, wait_until

PICTURES = 40
CLIENTS = 16
REQUESTS_EACH = 12
LEAVING = 0.3


@pytest.fixture
def app(whole: Application) -> Application:
    whole.clear()
    return whole


def stats(app: Application) -> EngineStats:
    engine = app.report("engine").engine
    assert engine is not None
    return engine


def test_forty_pictures_from_sixteen_clients_through_a_cache_of_three(app: Application) -> None:
    expected = {number: app.post("/v1/chat/completions", body(picture(number))).json() for number in range(PICTURES)}
    answers = {number: answer["choices"][0]["message"]["content"] for number, answer in expected.items()}
    right = sum(picture(number).color in answer for number, answer in answers.items())
    assert right >= 38, answers
    app.clear()
    before = stats(app)
    seen = asyncio.run(traffic(app, random.Random(1)))
    assert len(seen) > CLIENTS * REQUESTS_EACH / 2
    assert [(number, answer) for number, answer in seen if answer != answers[number]] == []
    wait_until(lambda: stats(app).running == 0 and stats(app).waiting == 0, 5, "the engine is idle")
    after, sender = stats(app), app.cache("engine", "sender")
    assert sender.evictions > 0
    assert sender.pinned == 0
    assert after.tensors_received - before.tensors_received == sender.misses
    assert (after.receiver_items, after.receiver_bytes) == (sender.entries, sender.bytes)
    assert after.aborted > before.aborted, "some left while the engine worked for them"


def test_a_stream_that_is_left_ends_in_the_engine_within_a_second(app: Application) -> None:
    before = stats(app)
    with app.http.stream("POST", "/v1/chat/completions", json=endless(picture(0))) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert stats(app).running == 1
    wait_until(lambda: stats(app).running == 0, 1, "the engine has nothing to do")
    assert stats(app).aborted == before.aborted + 1
    wait_until(lambda: app.cache("engine", "sender").pinned == 0, 1, "nothing is pinned")


def test_a_plain_request_that_is_left_ends_in_the_engine_within_a_second(app: Application) -> None:
    with pytest.raises(httpx.ReadTimeout):
        app.http.post("/v1/chat/completions", json={**endless(picture(0)), "stream": False}, timeout=0.5)
    wait_until(lambda: stats(app).running == 0, 1, "the engine has nothing to do")


def test_a_stream_over_a_handle_that_is_cancelled_ends_in_the_engine(app: Application) -> None:
    method = app.handle.options(stream=True).chat_completions_stream
    response = method.remote(endless(picture(0)))
    next(iter(response))
    wait_until(lambda: stats(app).running == 1, 1, "the engine works")
    response.cancel()
    wait_until(lambda: stats(app).running == 0, 1, "the engine has nothing to do")


def body(shown: Picture) -> dict[str, object]:
    return {"messages": about(shown, text=QUESTION), "temperature": 0, "max_tokens": 12}


def endless(shown: Picture) -> dict[str, object]:
    return {"messages": about(shown), "max_tokens": 3000, "ignore_eos": True, "stream": True}


async def traffic(app: Application, rng: random.Random) -> list[tuple[int, str]]:
    """The answers that the clients read to their end, with the pictures that they asked about."""
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as http, asyncio.TaskGroup() as group:
        clients = [group.create_task(client(http, random.Random(rng.random()))) for _ in range(CLIENTS)]
    return [answer for task in clients for answer in task.result()]


async def client(http: httpx.AsyncClient, rng: random.Random) -> list[tuple[int, str]]:
    read = []
    for _ in range(REQUESTS_EACH):
        number = rng.randrange(PICTURES)
        if rng.random() < LEAVING:
            await leave(http, number, rng)
        else:
            response = await http.post("/v1/chat/completions", json=body(picture(number)))
            assert response.status_code == 200, response.text
            read.append((number, response.json()["choices"][0]["message"]["content"]))
    return read


async def leave(http: httpx.AsyncClient, number: int, rng: random.Random) -> None:
    """Ask for more than there is time for, and go: before the answer, or in the middle of it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(rng.choice([0.02, 0.1, 0.4])):
            request = http.build_request("POST", "/v1/chat/completions", json=endless(picture(number)))
            response = await http.send(request, stream=True)
            try:
                async for _ in response.aiter_lines():
                    if rng.random() < 0.3:
                        break
            finally:
                await response.aclose()

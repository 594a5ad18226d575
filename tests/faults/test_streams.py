"""Streams outlive what produces them: the client's text is the undisturbed one, no token twice, none lost."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from tests.faults.cluster import START_S, Deployed, core_of, kill
from tests.faults.traffic import Ask, client, known_answers, story, streamed

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S)]

STREAMS = 32
TOKENS = 160
DEATHS = 2


@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
@pytest.mark.parametrize("victim", ["replica", "core"])
async def test_32_streams_with_images_survive_the_deaths_of_what_produces_them(
    app: Deployed, victim: str, sampling: str
) -> None:
    asks = [_story(sampling, number) for number in range(STREAMS)]
    undisturbed = await asyncio.to_thread(known_answers, app.url, asks)
    rng = random.Random(f"{victim} {sampling}")
    tokens = Tokens()
    async with client(app.url) as http, asyncio.TaskGroup() as group:
        texts = [group.create_task(_read(http, ask, tokens)) for ask in asks]
        for moment in sorted(rng.randrange(STREAMS, STREAMS * TOKENS // 2) for _ in range(DEATHS)):
            await tokens.reach(moment)
            await asyncio.to_thread(_end_one, app, victim, rng)
            assert not all(text.done() for text in texts)
    assert [text.result() for text in texts] == undisturbed


class Tokens:
    """How many events with text all clients together have received: not quite one for each token."""

    def __init__(self) -> None:
        self.count = 0
        self._more = asyncio.Event()

    def add(self) -> None:
        self.count += 1
        self._more.set()

    async def reach(self, count: int) -> None:
        while self.count < count:
            self._more.clear()
            await self._more.wait()


def _story(sampling: str, number: int) -> Ask:
    if sampling == "greedy":
        return story(number, TOKENS, temperature=0)
    return story(number, TOKENS, temperature=1.0, seed=number)


async def _read(http: httpx.AsyncClient, ask: Ask, tokens: Tokens) -> str:
    data = b""
    async with http.stream("POST", ask.path, json=ask.body) as response:
        assert response.status_code == 200, await response.aread()
        async for chunk in response.aiter_bytes():
            data += chunk
            for _ in range(chunk.count(b"data: ")):
                tokens.add()
    return streamed(data)


def _end_one(app: Deployed, victim: str, rng: random.Random) -> None:
    engine = rng.choice(app.replicas("EngineReplica"))
    kill(core_of(engine).pid if victim == "core" else engine.pid)

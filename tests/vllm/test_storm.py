"""Caches that cannot drift, all at once on a real vLLM.

Forty pictures and room for three, 64 clients of which some go away and some abort, two deaths of the core, and a storm
of render-only requests on the same renderer: no answer about another's picture, no miss, and as many tensors sent as
misses were counted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from renderer.errors import CacheMissError, EngineDeadError, EngineStartingError
from tests.vllm.conftest import GREEDY, Rig, chat, ids_of, kill_core

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLIENTS = 64
TURNS = 8
PICTURES = 40
KILLS_AFTER = (CLIENTS * TURNS // 3, 2 * CLIENTS * TURNS // 3)
STORMERS = 2
# Single pictures, and prompts of two and three, of which the largest fill the cache.
ASKED = (
    *((seed,) for seed in range(PICTURES)),
    *((seed, seed + 1) for seed in range(0, PICTURES, 8)),
    *((seed, seed + 1, seed + 2) for seed in range(1, PICTURES, 10)),
)
Pictures = tuple[int, ...]


@dataclass
class Storm:
    """What the clients share.

    Attributes:
        alone: What each prompt is answered alone.
    """

    rig: Rig
    alone: dict[Pictures, tuple[int, ...]]
    finished: int = 0
    rendered: int = 0
    retried: int = 0
    progress: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def client(self, number: int) -> None:
        choose = random.Random(number)
        for turn in range(TURNS):
            pictures = choose.choice([choose.choice(ASKED), ASKED[choose.randrange(3)]])
            fate = choose.choices(["stays", "goes away", "aborts"], [6, 2, 1])[0]
            ids = await self._answer(pictures, f"client-{number}-{turn}", fate, choose.choice([None, "tenant"]))
            assert ids == self.alone[pictures][: len(ids)], pictures
            assert fate != "stays" or len(ids) == GREEDY.max_tokens
            async with self.progress:
                self.finished += 1
                self.progress.notify_all()

    async def killer(self) -> None:
        for count in KILLS_AFTER:
            async with self.progress:
                while self.finished < count:
                    await self.progress.wait()
            kill_core()

    async def stormer(self, number: int) -> None:
        """One render-only request for each generation that ends: more would leave vLLM no core to start on."""
        choose = random.Random(-number)
        pool = self.rig.renderer.request_pool
        while True:
            pictures = choose.choice(ASKED)
            prompt = await pool.run(self.rig.renderer.render_chat, chat("What?", *pictures), True)
            assert all(item.tensors is not None for item in prompt.items)
            self.rendered += 1
            async with self.progress:
                await self.progress.wait()

    async def _answer(self, pictures: Pictures, request_id: str, fate: str, salt: str | None) -> tuple[int, ...]:
        """As router and replica do it: rendered again after a miss, continued after a death."""
        ids: list[int] = []
        while True:
            prompt = replace(await self.rig.render("What?", *pictures), cache_salt=salt)
            try:
                outputs = self.rig.engine.generate(prompt, GREEDY, request_id=request_id, prior_output_ids=tuple(ids))
                async with aclosing(outputs):
                    async for output in outputs:
                        ids += output.token_ids
                        if fate == "goes away":
                            return tuple(ids)
                        if fate == "aborts" and output.finish_reason is None:
                            await self.rig.engine.abort(request_id)
                return tuple(ids)
            except CacheMissError:
                continue
            except (EngineDeadError, EngineStartingError):
                self.retried += 1
                await self._until_up()

    async def _until_up(self) -> None:
        async with asyncio.timeout(600):
            while True:
                try:
                    return await self.rig.engine.health()
                except EngineDeadError:
                    await asyncio.sleep(0.1)


@asynccontextmanager
async def in_background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Fails where one of them does."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends), ends


async def test_a_small_cache_in_a_storm_neither_drifts_nor_confuses_pictures(rig: Rig) -> None:
    alone = {pictures: ids_of(await rig.ask(await rig.render("What?", *pictures), GREEDY)) for pictures in ASKED}
    assert len(set(alone.values())) > len(ASKED) // 2
    await rig.engine.reset_cache()
    before, hits_before = await rig.engine.stats(), rig.engine.sender_cache.stats
    storm = Storm(rig, alone)
    async with in_background(*map(storm.stormer, range(STORMERS)), storm.killer()):
        await asyncio.gather(*map(storm.client, range(CLIENTS)))
    after, cache = await rig.engine.stats(), rig.engine.sender_cache.stats
    assert after.receiver_misses == 0
    assert after.tensors_received - before.tensors_received == cache.misses - hits_before.misses
    assert cache.hits > 0
    assert cache.bytes <= rig.engine.config.mm_cache_bytes
    assert after.restarts - before.restarts == len(KILLS_AFTER)
    assert after.running + after.waiting == 0
    assert min(storm.rendered, storm.retried) > 0

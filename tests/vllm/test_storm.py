"""Caches that cannot drift, all at once on a real vLLM.

Forty pictures and room for three, 64 clients of which some go away and some abort, two deaths of the core, and a storm
of render-only requests on the same renderer, some pictures processed elsewhere under the same hashes: no answer about
another's picture, no miss, and as many tensors sent as misses were counted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from renderer.conversation import FeatureItem, FeaturesRequest
from renderer.errors import CacheMissError, EngineDeadError, EngineStartingError
from renderer.prompt import RenderedPrompt
from tests.vllm.conftest import GREEDY, Rig, chat, ids_of, kill_core

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLIENTS = 64
TURNS = 8
PICTURES = 40
KILLS_AFTER = (CLIENTS * TURNS // 3, 2 * CLIENTS * TURNS // 3)
STORMERS = 2
Pictures = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """
    Attributes:
        claim: How its pictures come: "" as pictures, `whole` processed elsewhere, `null` by their claimed hashes alone.
    """

    pictures: Pictures
    salt: str | None
    claim: str


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
    claimed: int = 0
    unknown: int = 0
    progress: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def client(self, number: int) -> None:
        choose = random.Random(number)
        asked = list(self.alone)
        for turn in range(TURNS):
            pictures = choose.choice([choose.choice(asked), asked[choose.randrange(3)]])
            fate = choose.choices(["stays", "goes away", "aborts"], [6, 2, 1])[0]
            prompt = Asked(
                pictures, choose.choice([None, "tenant"]), choose.choices(["", "whole", "null"], [6, 2, 2])[0]
            )
            try:
                ids = await self._answer(prompt, f"client-{number}-{turn}", fate)
                assert ids == self.alone[pictures][: len(ids)], pictures
                assert fate != "stays" or len(ids) == GREEDY.max_tokens
                self.claimed += prompt.claim != ""
            except CacheMissError:
                assert prompt.claim == "null"
                self.unknown += 1
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
            pictures = choose.choice(list(self.alone))
            prompt = await pool.run(self.rig.renderer.render_chat, chat("What?", *pictures), True)
            assert all(item.tensors is not None for item in prompt.items)
            self.rendered += 1
            async with self.progress:
                await self.progress.wait()

    async def _answer(self, asked: Asked, request_id: str, fate: str) -> tuple[int, ...]:
        """As router and replica do it: rendered again after a miss, continued after a death.

        Raises:
            CacheMissError: An item came without data, and is not held.
        """
        ids: list[int] = []
        while True:
            prompt = await self._prompt(asked)
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
                if asked.claim == "null":
                    raise
            except (EngineDeadError, EngineStartingError):
                self.retried += 1
                await self._until_up()

    async def _prompt(self, asked: Asked) -> RenderedPrompt:
        renderer, pool = self.rig.renderer, self.rig.renderer.request_pool
        if not asked.claim:
            return replace(await self.rig.render("What?", *asked.pictures), cache_salt=asked.salt)
        whole = await pool.run(renderer.render_chat, chat("What?", *asked.pictures), True)
        data = [item.tensors if asked.claim == "whole" else None for item in whole.items]
        items = [FeatureItem(item.mm_hash, item.range, own) for item, own in zip(whole.items, data, strict=True)]
        prompt: RenderedPrompt = await pool.run(
            renderer.receive, FeaturesRequest(whole.token_ids, tuple(items), asked.salt)
        )
        return prompt

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
    alone = await answers_that_differ(rig)
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
    assert min(storm.rendered, storm.retried, storm.claimed, storm.unknown) > 0


async def answers_that_differ(rig: Rig) -> dict[Pictures, tuple[int, ...]]:
    """Forty pictures, and prompts of two and three of them, of which the largest fill the cache: what each is answered
    alone. No two answers are equal, so an answer is about its own pictures or wrong."""
    alone: dict[Pictures, tuple[int, ...]] = {}

    async def ask(*pictures: int) -> None:
        ids = ids_of(await rig.ask(await rig.render("What?", *pictures), GREEDY))
        if ids not in alone.values():
            alone[pictures] = ids

    for seed in range(4 * PICTURES):
        if len(alone) < PICTURES:
            await ask(seed)
    assert len(alone) == PICTURES
    seeds = [seed for (seed,) in alone]
    for place in range(0, PICTURES - 2, 4):
        await ask(*seeds[place : place + 2 + place // 4 % 2])
    assert len(alone) > PICTURES + 5
    return alone

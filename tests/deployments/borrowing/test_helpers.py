"""Items go to whoever is free, come back whatever happens, and stop when nobody waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from deployments.borrowing.helpers import ATTEMPTS, Helpers
from deployments.borrowing.rule import BorrowRule
from deployments.config import HelpersConfig
from renderer.caches import ProcessedItem
from renderer.errors import MediaError, OverloadedError
from renderer.media import MediaItem
from renderer.prompt import ImageSize
from renderer.threads import WarmPool
from tests.stack.helpers import wait_until

SIZE = ImageSize(100, 100)
DEADLINE_S = 10
ALWAYS = BorrowRule("always")


def item(index: int) -> MediaItem:
    return MediaItem(index, b"", None, SIZE, f"hash{index}", f"key{index}")


def processed(each: MediaItem) -> ProcessedItem:
    tensor = np.full(4, each.index)
    tensor.flags.writeable = False
    return ProcessedItem(SIZE, {"pixels": tensor}, 32)


class Tier:
    """Replicas that answer when they are told to, or raise what is next in `errors`."""

    def __init__(self, replicas: int = 1) -> None:
        self.number = replicas
        self.errors: list[BaseException] = []
        self.asked: list[int] = []
        self.cancelled: list[int] = []
        self.go = asyncio.Event()
        self.go.set()

    def open(self) -> None:
        pass

    def replicas(self) -> int:
        return self.number

    async def process(self, item: MediaItem) -> ProcessedItem:
        self.asked.append(item.index)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(item.index)
            raise
        if self.errors:
            raise self.errors.pop(0)
        return ProcessedItem(SIZE, {"pixels": np.full(4, item.index)}, 32)


@pytest.fixture
async def pool() -> AsyncIterator[WarmPool]:
    pool = WarmPool(2, "media")
    yield pool
    pool.close()


class Local:
    """Work in this process, which can be held."""

    def __init__(self, pool: WarmPool) -> None:
        self.pool = pool
        self.done: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def of(self, each: MediaItem) -> Any:
        return lambda: self.pool.submit(self.work, each)

    def work(self, each: MediaItem) -> ProcessedItem:
        self.go.wait(DEADLINE_S)
        self.done.append(each.index)
        return processed(each)


def helpers(tier: Tier, rule: BorrowRule = ALWAYS, patience_s: float = DEADLINE_S, **options: Any) -> Helpers:
    return Helpers(tier, rule, 2, HelpersConfig(items_per_replica=2, patience_s=patience_s), **options)


async def result(future: Future[ProcessedItem]) -> int:
    async with asyncio.timeout(DEADLINE_S):
        tensors = (await asyncio.wrap_future(future)).tensors
    assert tensors is not None
    assert not tensors["pixels"].flags.writeable
    return int(tensors["pixels"][0])


async def test_items_elsewhere_are_bounded_and_begin_in_their_order(pool: WarmPool) -> None:
    tier, local = Tier(), Local(pool)
    source = helpers(tier)
    tier.go.clear()
    futures = [source.compute(item(index), 6, local.of(item(index))) for index in range(6)]
    await until(lambda: len(tier.asked) == 2, "two are asked for")
    tier.go.set()
    assert [await result(future) for future in futures] == list(range(6))
    assert (tier.asked, local.done) == (list(range(6)), [])
    assert source.counts == {"borrowed": 6}


async def test_items_wait_for_whoever_is_free_first(pool: WarmPool) -> None:
    tier, local = Tier(), Local(pool)
    source = helpers(tier, BorrowRule("auto"))
    tier.go.clear()
    local.go.clear()
    futures = [source.compute(item(index), 6, local.of(item(index))) for index in range(6)]
    await until(lambda: tier.asked == [2, 3], "threads here are taken, so two are asked for elsewhere")
    local.go.set()
    assert [await result(future) for future in (*futures[:2], *futures[4:])] == [0, 1, 4, 5]
    tier.go.set()
    assert [await result(future) for future in futures[2:4]] == [2, 3]
    assert source.counts == {"here": 4, "borrowed": 2}


async def test_a_decoding_engine_sends_its_items_away(pool: WarmPool) -> None:
    tier, local = Tier(), Local(pool)
    source = helpers(tier, BorrowRule("auto"), decoding=lambda: 3.0)
    assert await result(source.compute(item(0), 1, local.of(item(0)))) == 0
    assert source.counts == {"borrowed": 1}


async def test_a_lost_replica_is_tried_again_and_at_last_the_item_is_processed_here(
    pool: WarmPool, counted: Counter[str]
) -> None:
    tier, local = Tier(), Local(pool)
    source = helpers(tier)
    tier.errors = [RayActorError()]
    assert await result(source.compute(item(0), 1, local.of(item(0)))) == 0
    assert source.counts == {"lost": 1, "borrowed": 1}
    tier.errors = [RayActorError()] * ATTEMPTS
    assert await result(source.compute(item(1), 1, local.of(item(1)))) == 1
    assert local.done == [1]
    assert source.counts == {"lost": 1 + ATTEMPTS, "borrowed": 1, "returned": 1}
    assert counted == {f"borrowed_items {outcome}": number for outcome, number in source.counts.items()}


@pytest.mark.parametrize("error", [OverloadedError("full"), ValueError("RESOURCE_EXHAUSTED")])
async def test_what_the_tier_cannot_do_is_done_here(pool: WarmPool, error: Exception) -> None:
    tier, local = Tier(), Local(pool)
    tier.errors = [error]
    assert await result(helpers(tier).compute(item(0), 1, local.of(item(0)))) == 0
    assert local.done == [0]


async def test_a_call_that_ended_with_the_request_that_made_it_is_made_again_for_others(pool: WarmPool) -> None:
    tier, local = Tier(), Local(pool)
    tier.errors = [asyncio.CancelledError()]
    source = helpers(tier)
    assert await result(source.compute(item(3), 1, local.of(item(3)))) == 3
    assert source.counts == {"lost": 1, "borrowed": 1}
    assert local.done == []


async def test_a_replica_that_takes_too_long_is_not_waited_for(pool: WarmPool) -> None:
    tier, local = Tier(), Local(pool)
    tier.go.clear()
    source = helpers(tier, patience_s=0.05)
    assert await result(source.compute(item(0), 1, local.of(item(0)))) == 0
    assert (tier.cancelled, source.counts) == ([0], {"returned": 1})


async def test_a_bad_item_is_bad_everywhere(pool: WarmPool) -> None:
    tier, local = Tier(), Local(pool)
    tier.errors = [MediaError("it is corrupt", 7)]
    with pytest.raises(MediaError, match="image 7: it is corrupt"):
        await result(helpers(tier).compute(item(7), 1, local.of(item(7))))
    assert (len(tier.asked), local.done) == (1, [])


async def test_items_that_nobody_waits_for_stop_where_they_are_and_the_next_ones_begin(pool: WarmPool) -> None:
    tier, local = Tier(), Local(pool)
    source = helpers(tier)
    tier.go.clear()
    futures = [source.compute(item(index), 4, local.of(item(index))) for index in range(4)]
    await until(lambda: tier.asked == [0, 1], "two are asked for")
    assert futures[2].cancel()
    assert futures[0].cancel()
    await until(lambda: (tier.asked, tier.cancelled) == ([0, 1, 3], [0]), "the fourth begins, the third never does")
    tier.go.set()
    assert [await result(futures[index]) for index in (1, 3)] == [1, 3]


async def test_without_replicas_everything_is_processed_here(pool: WarmPool) -> None:
    tier, local = Tier(replicas=0), Local(pool)
    source = helpers(tier)
    assert await result(source.compute(item(0), 1, local.of(item(0)))) == 0
    assert source.counts == {"here": 1}


async def test_items_to_be_kept_do_not_lean_on_shared_memory(pool: WarmPool) -> None:
    shared = np.arange(4)

    class Lending(Tier):
        async def process(self, item: MediaItem) -> ProcessedItem:
            return ProcessedItem(SIZE, {"pixels": shared}, 32)

    for copies in (False, True):
        source = helpers(Lending(), copies=copies)
        got = await asyncio.wrap_future(source.compute(item(0), 1, Local(pool).of(item(0))))
        assert got.tensors is not None
        assert np.shares_memory(got.tensors["pixels"], shared) is not copies


async def until(condition: Any, what: str) -> None:
    await asyncio.to_thread(wait_until, condition, DEADLINE_S, what)

"""Nothing grows: ten thousand requests, a tenth of them given up, through a cache of three pictures."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import psutil
import pytest

from engine.embedded import EmbeddedEngine
from engine.protocol import EngineOutput, SamplingParams
from tests.checkpoints import checkpoint
from tests.engine.builders import Picture, Text, engine_config, lab, lend

FAMILY = "qwen2_5_vl"
REQUESTS, CLIENTS, SETTLED = 10_000, 16, 2_000
ITEM_BYTES = sum(tensor.nbytes for tensor in (lab(FAMILY).prompt(Picture(0)).items[0].tensors or {}).values())
# What an allocator keeps of its own: nothing of a request, of which there are eight thousand.
SLACK_BYTES = 24 * 2**20


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_nothing_grows_over_ten_thousand_requests() -> None:
    asyncio.run(growth())


async def growth() -> None:
    engine = EmbeddedEngine(engine_config(checkpoint(FAMILY), mm_cache_bytes=3 * ITEM_BYTES))
    await engine.start()
    try:
        await load(engine, SETTLED, seed=0)
        before = resident(engine)
        await load(engine, REQUESTS - SETTLED, seed=1)
        after = resident(engine)
        stats = await engine.stats()
        print(f"resident bytes after {SETTLED} and {REQUESTS} requests: {before}, {after}")
        assert stats.requests >= 0.9 * REQUESTS
        assert stats.running == stats.waiting == stats.blocks_used == 0
        assert stats.receiver_items <= 3
        assert engine.sender_cache.stats.pinned == 0
        for process in ("core", "replica"):
            assert after[process] - before[process] < SLACK_BYTES, process
    finally:
        await engine.close()


async def load(engine: EmbeddedEngine, requests: int, seed: int) -> None:
    dice = random.Random(seed)
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=3, logprobs=1, ignore_eos=True)
    turns = iter(range(requests))

    async def client() -> None:
        for number in turns:
            prompt = lend(
                lab(FAMILY).prompt(Text(6, dice.randrange(10**6)), Picture(dice.randrange(12))), engine.sender_cache
            )
            outputs = cast(AsyncGenerator[EngineOutput], engine.generate(prompt, params, request_id=str(number)))
            async with aclosing(outputs):
                async for _ in outputs:
                    if dice.random() < 0.1:
                        break

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


def resident(engine: EmbeddedEngine) -> dict[str, int]:
    own = psutil.Process()
    core = next(child for child in own.children() if "engine.core" in child.cmdline())
    return {"core": core.memory_info().rss, "replica": own.memory_info().rss}

"""All caches of one engine replica at once, with the real renderer, engine and model: a budget of three pictures, forty
pictures, many clients that leave, a core that is killed, requests that only render. No answer is ever about another's
picture, and what was sent is what the sender cache counted."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cache

import pytest

from demo.questions import description
from demo.scenes import COLORS, SHAPES, Background, Scene, Shape, draw
from deployments.bodies.chat import ChatBody
from deployments.bodies.strict import parse
from deployments.calls import Choice, Delta, Envelope, GenerateCall, Generation, RenderCall, SamplingRequest
from deployments.engine_replica import EngineReplica
from deployments.failover import continued
from engine.protocol import EngineStats
from renderer.caches import CacheStats
from renderer.conversation import ChatRequest, FeatureItem, FeaturesRequest
from renderer.errors import CacheMissError
from tests.deployments.test_engine_replica import core, started, stopped, tier_config
from tests.stack.helpers import ITEM_BYTES, SIDE, Picture, about

PICTURES = 40
GREY = (128, 128, 128)
CACHED = 3
GREEDY = SamplingRequest(max_tokens=20, temperature=0)
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Storm:
    clients: int
    requests: int
    kills: int


SMALL, LARGE = Storm(clients=16, requests=3, kills=1), Storm(clients=64, requests=12, kills=5)


@pytest.fixture(scope="module")
def replica() -> Iterator[EngineReplica]:
    engine = {"mm_cache_bytes": CACHED * ITEM_BYTES, "max_num_seqs": 16, "kv_cache_bytes": 16 * 2**20}
    replica = started(tier_config(engine=engine))
    yield replica
    stopped(replica)


@cache
def seen(number: int) -> tuple[Picture, str]:
    """Another picture of two shapes for each number, and what there is to say about it alone."""
    kinds, colors = list(SHAPES), list(COLORS)
    names = ((number % 4, number % 8), ((number // 4 + 1) % 4, (number * 3 + number // 8 + 1) % 8))
    shapes = [
        Shape(kinds[kind], colors[color], COLORS[colors[color]][0], 62 + 100 * place, SIDE / 2, 42.0)
        for place, (kind, color) in enumerate(names)
    ]
    scene = Scene(SIDE, SIDE, tuple(shapes), Background("plain", GREY, GREY))
    stream = io.BytesIO()
    draw(scene).save(stream, "PNG")
    return Picture(stream.getvalue(), ""), f"The picture shows {description(scene)}."


def chat(number: int) -> ChatRequest:
    return parse(ChatBody, {"messages": about(seen(number)[0], text="Describe the picture.")}).request()


def call(request: Generation, name: str) -> GenerateCall:
    return GenerateCall(request, GREEDY, (Choice(0),), name, False, client_id=name)


def as_features(replica: EngineReplica, number: int, salt: str | None, data: bool = True) -> FeaturesRequest:
    """The same question, its picture processed elsewhere."""
    prompt = replica.renderer.render_chat(chat(number), skip_mm_cache=True)
    (item,) = prompt.items
    tensors = item.tensors if data else None
    return FeaturesRequest(prompt.token_ids, (FeatureItem(item.mm_hash, item.range, tensors),), salt)


class Clients:
    """Everybody who asks one replica, as a router passes it on."""

    def __init__(self, replica: EngineReplica, right: list[tuple[int, ...]], seed: int) -> None:
        self.replica = replica
        self.right = right
        self.dice = random.Random(seed)
        self.answers = 0
        self.unknown = 0

    async def client(self, number: int, requests: int) -> None:
        for place in range(requests):
            name = f"{number}-{place}"
            picture = self.dice.randrange(PICTURES) if self.dice.random() < 0.6 else self.dice.randrange(4)
            await self.ask(name, picture)

    async def ask(self, name: str, picture: int) -> None:
        way = self.dice.random()
        if way < 0.5:
            await self.read(call(chat(picture), name), picture)
        elif way < 0.8:
            salt = self.dice.choice([None, "one", "other"])
            await self.read(call(as_features(self.replica, picture, salt), name), picture)
        else:
            try:
                await self.read(call(as_features(self.replica, picture, "one", data=False), name), picture)
            except CacheMissError:
                self.unknown += 1

    async def read(self, asked: GenerateCall, picture: int) -> None:
        """Some leave in the middle, some have their request aborted."""
        leaves = self.dice.randrange(8) if self.dice.random() < 0.2 else None
        aborted = self.dice.random() < 0.1
        tokens: list[int] = []
        ended = None
        async with aclosing(continued(asked, self.replica.generate, PATIENCE_S)) as events:
            async for event in events:
                if not isinstance(event, Delta):
                    continue
                tokens += event.token_ids
                ended = event.finish_reason
                if leaves is not None and len(tokens) > leaves:
                    break
                if aborted:
                    await self.replica.abort([asked.client_id])
        assert tuple(tokens) == self.right[picture][: len(tokens)]
        assert ended != "stop" or tuple(tokens) == self.right[picture]
        self.answers += ended == "stop"

    async def render(self, count: int) -> None:
        """Requests that only render, as many at once as the renderer has threads for."""
        for _ in range(count):
            picture = self.dice.randrange(PICTURES)
            rendering = RenderCall(chat(picture), GREEDY, Envelope("id"), skip_mm_cache=True)
            (prompt,) = (await self.replica.render(rendering)).value
            assert prompt.items[0].tensors is not None

    async def kill(self, times: int, answers: int, done: asyncio.Event) -> None:
        """After so many answers each: a request that three cores die under is given up."""
        for number in range(times):
            while self.answers < answers * (number + 1) and not done.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            core().kill()


async def alone(replica: EngineReplica) -> list[tuple[int, ...]]:
    """What each picture's question is answered with, one after the other: what it shows, which no other does."""
    answers = []
    for number in range(PICTURES):
        deltas = [delta async for delta in replica.generate(call(chat(number), "alone")) if isinstance(delta, Delta)]
        assert "".join(delta.text for delta in deltas) == seen(number)[1]
        answers.append(tuple(token for delta in deltas for token in delta.token_ids))
    assert len(set(answers)) == PICTURES
    return answers


async def storm(replica: EngineReplica, right: list[tuple[int, ...]], size: Storm, seed: int) -> Clients:
    clients, done = Clients(replica, right, seed), asyncio.Event()
    killing = asyncio.create_task(clients.kill(size.kills, size.clients, done))
    asking = [clients.client(number, size.requests) for number in range(size.clients)]
    await asyncio.gather(*asking, *(clients.render(size.requests) for _ in range(size.clients // 4)))
    done.set()
    await killing
    return clients


async def levels(replica: EngineReplica) -> tuple[EngineStats, CacheStats]:
    """Once nothing runs: the last ones to leave are not waited for."""
    async with asyncio.timeout(PATIENCE_S):
        while not await is_idle(replica):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return await replica.engine.stats(), replica.caches["sender"]


async def is_idle(replica: EngineReplica) -> bool:
    if not replica.engine._serving:  # type: ignore[attr-defined]
        return False
    stats = await replica.engine.stats()
    return stats.running == stats.waiting == replica.caches["sender"].pinned == 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "size", [pytest.param(SMALL), pytest.param(LARGE, marks=pytest.mark.faults)], ids=["small", "large"]
)
def test_nothing_drifts_and_no_answer_is_about_anothers_picture(replica: EngineReplica, size: Storm) -> None:
    asyncio.run(scenario(replica, size))


async def scenario(replica: EngineReplica, size: Storm) -> None:
    right = await alone(replica)
    killed = await storm(replica, right, size, seed=1)
    first, before = await levels(replica)
    assert first.restarts >= size.kills
    assert (first.receiver_items, first.receiver_bytes) == (before.entries, before.bytes)
    quiet = await storm(replica, right, replace(size, kills=0), seed=2)
    last, after = await levels(replica)
    assert last.tensors_received - first.tensors_received == after.misses - before.misses > 0
    assert (last.receiver_items, last.receiver_bytes) == (after.entries, after.bytes)
    assert last.receiver_items <= CACHED
    assert last.receiver_misses == last.blocks_used == 0
    assert after.hits > before.hits
    assert after.evictions > before.evictions
    assert min(killed.answers, quiet.answers) > size.clients
    assert killed.unknown + quiet.unknown > 0

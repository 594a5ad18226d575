"""One engine replica in this process, with the real engine and the real renderer, without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from deployments.bodies.chat import ChatBody
from deployments.bodies.strict import parse
from deployments.calls import Choice, Delta, GenerateCall, ReplicaReport, SamplingRequest
from deployments.config import EngineTierConfig, GreenroomConfig
from deployments.engine_replica import MAX_RENDERINGS, EngineReplica
from deployments.records import Record
from deployments.rendering import RenderOnly
from deployments.tier import Operation, Tiers, choose_tier
from engine.config import EngineConfig
from engine.embedded import EmbeddedEngine
from engine.protocol import EngineOutput, EngineStats, SamplingParams
from renderer.caches import CacheStats
from renderer.conversation import ChatRequest, ImagePart, TokensRequest
from renderer.errors import CacheMissError, EngineDeadError, EngineStartingError
from renderer.prompt import RenderedPrompt
from renderer.renderer import Renderer
from tests.stack.helpers import ITEM_BYTES, about, picture, wait_until

RESTART_S = 0.5
GREEDY = SamplingRequest(max_tokens=12, temperature=0)


def embedded(config: EngineTierConfig) -> EngineConfig:
    return EngineConfig.model_validate(config.engine.model_dump())


def tier_config(**tier: Any) -> EngineTierConfig:
    config = GreenroomConfig.model_validate(
        {"model": "demo/model", "renderer": {"media_threads": 1, "render_threads": 2}, "engine": tier}
    )
    assert config.engine is not None
    return config.engine


def started(config: EngineTierConfig, engine: Any = None) -> EngineReplica:
    """A replica as Serve makes one: it awaits the constructor."""
    replica = EngineReplica.__new__(EngineReplica)
    asyncio.run(replica.__init__(config, engine=engine))  # type: ignore[misc]
    return replica


def stopped(replica: EngineReplica) -> None:
    replica.renderer.close()
    asyncio.run(replica.engine.close())


def chat(*numbers: int) -> ChatRequest:
    return parse(ChatBody, {"messages": about(*(picture(number) for number in numbers))}).request()


def call(request: ChatRequest | TokensRequest, sampling: SamplingRequest = GREEDY, skip: bool = False) -> GenerateCall:
    choices = tuple(Choice(index) for index in range(sampling.n))
    return GenerateCall(request, sampling, choices, "id", skip)


async def answers(replica: EngineReplica, asked: GenerateCall) -> list[str]:
    texts = [""] * len(asked.choices)
    async for event in replica.generate(asked):
        if isinstance(event, Delta):
            texts[event.index] += event.text
    return texts


def core() -> psutil.Process:
    """The engine core that this process started last."""
    children = psutil.Process().children(recursive=True)
    return max(
        (child for child in children if "engine.core" in " ".join(child.cmdline())), key=psutil.Process.create_time
    )


async def down(check: Awaitable[None]) -> EngineDeadError | None:
    try:
        await check
    except EngineDeadError as error:
        return error
    return None


class Lender:
    """A handle to a render replica in this process."""

    def __init__(self, replica: RenderOnly) -> None:
        router = SimpleNamespace(curr_replicas={"only": replica})
        self._router = SimpleNamespace(_asyncio_router=SimpleNamespace(request_router=router, _running_replicas=[]))
        self._replica = replica

    def options(self, *, method_name: str, **_: Any) -> Any:
        return SimpleNamespace(remote=getattr(self._replica, method_name))


def helped(replica: EngineReplica) -> bool:
    return replica._helpers is not None and replica._helpers._tier.replicas() > 0


class Lending(RenderOnly):
    async def report(self) -> ReplicaReport:
        return self.record.report()


@pytest.mark.parametrize("apart", [False, True], ids=["beside its engine", "apart from its engine"])
async def test_items_are_borrowed_by_the_processor_that_renders_for_the_engine(apart: bool) -> None:
    config = tier_config(borrow="always")
    lender = Lending(Renderer(config.renderer), Record("render"))
    engine: Any = EmbeddedEngine(embedded(config))
    replica = EngineReplica.__new__(EngineReplica)
    await replica.__init__(config, Lender(lender), Apart(engine) if apart else engine)  # type: ignore[misc]
    try:
        assert replica._helpers is not None
        assert replica._helpers.counts == {}, "warm-up leaves no trace"
        await asyncio.to_thread(wait_until, lambda: helped(replica), 10, "the lender is found")
        for _ in range(2):
            (answer,) = await answers(replica, call(chat(3), skip=apart))
            assert picture(3).color in answer
        assert replica._helpers.counts == {"borrowed": 1}
        assert lender.record.report().requests == {"borrowed": 1}
        used, unused = ("processor", "sender") if apart else ("sender", "processor")
        assert replica.caches[used] == CacheStats(entries=1, bytes=ITEM_BYTES, hits=1, misses=1)
        assert replica.caches.get(unused, CacheStats()) == CacheStats()
        lent = lender.renderer.readonly_mm_processor.cache
        assert lent is not None
        assert lent.stats.entries == int(apart), "the mm_processor of a render replica has no cache"
    finally:
        replica.renderer.close()
        lender.renderer.close()
        await replica.engine.close()


async def until(is_down: bool, check: Callable[[], Awaitable[None]]) -> None:
    """Return once a check fails, or passes: nothing tells of it, so it is asked again and again."""
    async with asyncio.timeout(60):
        while (await down(check()) is not None) != is_down:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def stats(replica: EngineReplica) -> EngineStats:
    return asyncio.run(replica.engine.stats())


@pytest.fixture(scope="module")
def shared() -> Iterator[EngineReplica]:
    replica = started(tier_config(restart_s=RESTART_S))
    yield replica
    stopped(replica)


@pytest.fixture
def replica(shared: EngineReplica) -> EngineReplica:
    asyncio.run(shared.clear_mm_cache())
    return shared


def test_the_choices_of_a_prompt_send_its_image_once(replica: EngineReplica) -> None:
    before = stats(replica).tensors_received
    sampling = SamplingRequest(max_tokens=4, temperature=1.0, seed=1, n=3, ignore_eos=True)
    assert len(asyncio.run(answers(replica, call(chat(0), sampling)))) == 3
    assert replica.caches["sender"] == CacheStats(entries=1, bytes=ITEM_BYTES, hits=2, misses=1)
    assert stats(replica).tensors_received - before == 1


def test_nothing_stays_pinned_when_a_reader_leaves_at_any_time(replica: EngineReplica) -> None:
    endless = SamplingRequest(max_tokens=2000, temperature=1.0, n=2, ignore_eos=True)

    async def leave_after(seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), aclosing(replica.generate(call(chat(1), endless))) as events:
                async for _ in events:
                    pass

    async def leave_often() -> None:
        for step in range(12):
            await leave_after(0.002 * step)

    asyncio.run(leave_often())
    assert replica.caches["sender"].pinned == 0
    assert stats(replica).running == 0


def test_a_restarting_engine_fails_the_health_check_only_after_its_time(replica: EngineReplica) -> None:
    async def watch() -> None:
        core().kill()
        await until(True, replica.engine.health)
        with pytest.raises(EngineStartingError):
            await answers(replica, call(chat(0)))
        assert await down(replica.check_health()) is None, "a core that has just died is restarting"
        begun = time.monotonic()
        await until(True, replica.check_health)
        assert time.monotonic() - begun >= RESTART_S
        await until(False, replica.engine.health)
        await replica.check_health()

    asyncio.run(watch())


def test_an_item_that_is_gone_at_every_submission_crosses_with_its_tensors_in_the_end(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = asyncio.run(answers(replica, call(chat(4))))
    submissions = []
    generate = replica.engine.generate

    async def lossy(prompt: RenderedPrompt, *rest: Any, **named: Any) -> AsyncIterator[EngineOutput]:
        """As an engine that knows no pins, and has dropped whatever was not sent with the request."""
        submissions.append(prompt)
        if any(item.tensors is None for item in prompt.items):
            raise CacheMissError("the item is not held")
        async for output in generate(prompt, *rest, **named):
            yield output

    monkeypatch.setattr(replica.engine, "generate", lossy)
    assert asyncio.run(answers(replica, call(chat(4)))) == [first]
    assert len(submissions) == MAX_RENDERINGS
    assert replica.caches["sender"].pinned == 0


def test_cached_tokens_are_told_also_where_the_engine_tells_of_them_at_the_end(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = call(chat(4), SamplingRequest(max_tokens=4, temperature=1.0, seed=1, n=2, ignore_eos=True))

    async def told() -> tuple[int, int]:
        """With the first token, and afterwards."""
        cached = [0, 0]
        async for event in replica.generate(asked):
            if isinstance(event, Delta):
                cached[1] += event.late_cached_tokens
            else:
                cached[0] += event.cached_tokens
        return cached[0], cached[1]

    asyncio.run(told())
    at_once, later = asyncio.run(told())
    assert (at_once > 0, later) == (True, 0)
    generate = replica.engine.generate

    async def late(*rest: Any, **named: Any) -> AsyncIterator[EngineOutput]:
        async for output in generate(*rest, **named):
            yield output if output.finish_reason else replace(output, num_cached_tokens=0)

    monkeypatch.setattr(replica.engine, "generate", late)
    assert asyncio.run(told()) == (0, at_once)


class LosesItsCore(EmbeddedEngine):
    """Its core dies between the rendering of the second request and its submission, and is up again by then."""

    requests = 0

    async def generate(
        self, prompt: RenderedPrompt, params: SamplingParams, *, request_id: str, prior_output_ids: Sequence[int] = ()
    ) -> AsyncIterator[EngineOutput]:
        self.requests += 1
        if self.requests == 2:
            core().kill()
            await until(True, self.health)
            await until(False, self.health)
        outputs = super().generate(prompt, params, request_id=request_id, prior_output_ids=prior_output_ids)
        async for output in outputs:
            yield output


def test_what_the_engine_lost_between_rendering_and_submission_is_rendered_again() -> None:
    config = tier_config()
    replica = started(config, LosesItsCore(embedded(config)))
    try:
        first = asyncio.run(answers(replica, call(chat(2))))
        assert asyncio.run(answers(replica, call(chat(2)))) == first
        assert picture(2).color in first[0]
        assert replica.caches["sender"].entries == 1
    finally:
        stopped(replica)


class Apart:
    """An engine that runs elsewhere, as far as the renderer beside it can tell: there is no cache to share."""

    sender_cache = None

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_serve_tokens_skips_mm_cache_for_remote_engine_execution() -> None:
    config = tier_config()
    replica = started(config, Apart(EmbeddedEngine(embedded(config))))
    skip = choose_tier(Operation.GENERATE_PARTS, Tiers(render=True, engine="remote")).skip_mm_cache
    assert skip is True
    try:
        ids = replica.renderer.layout(chat(3)).token_ids
        place = ids.index(766)
        once = tuple(token for position, token in enumerate(ids) if token != 766 or position == place)
        request = TokensRequest(once, (ImagePart(picture(3).png),))
        for _ in range(2):
            (answer,) = asyncio.run(answers(replica, call(request, skip=skip)))
            assert picture(3).color in answer
        assert replica.caches == {"processor": CacheStats(entries=1, bytes=ITEM_BYTES, hits=1, misses=1)}
    finally:
        stopped(replica)

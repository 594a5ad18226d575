"""Every metric of Greenroom's own, by definition; where a figure comes from calls `metrics()`.

Ray exports them as `ray_<name>` (counters with `_total`), each with the application, deployment and replica that told
it. What Ray Serve counts itself (HTTP requests, latencies of calls, queues, replicas) is not counted again here.
`docs/operations.md` lists all of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from ray.serve.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from deployments.calls import ReplicaReport
    from engine.protocol import EngineOutput
    from renderer.prompt import RenderedPrompt

logger = logging.getLogger("ray.serve.greenroom")

# Levels and totals that others keep are told this often; Ray exports every ten seconds.
SAMPLE_PERIOD_S = 5.0
STAGE_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
FIRST_TOKEN_SECONDS = [0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60]
TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5]
# Fields of `CacheStats` and `EngineStats`: totals, which only grow, and levels.
CACHE_TOTALS = {
    "hits": "Items found in a media cache; for the sender cache, sent to the engine without tensors.",
    "misses": "Items not found in a media cache, processed therefore.",
    "evictions": "Items dropped for others' sake.",
    "uncached": "Items that passed because there was no room.",
}
CACHE_LEVELS = {"entries": "Items in a media cache.", "bytes": "Bytes in a media cache.", "pinned": "Items in use."}
ENGINE_TOTALS = {
    "encoder_runs": "Items that the vision encoder ran on.",
    "encoder_hits": "Items whose encoder output was held.",
    "receiver_misses": "Items that the engine should have held and did not.",
    "aborted": "Sequences ended before their time.",
    "restarts": "How often the engine's core died and came back.",
}
ENGINE_LEVELS = {
    "running": "Sequences in the engine's batch.",
    "waiting": "Sequences that wait for a place in it.",
    "blocks_used": "Blocks of the key-value cache in use.",
    "blocks_total": "Blocks of the key-value cache.",
}


class Metrics:
    """The instruments of this process. Serve's tags are taken from the replica's context when they are made."""

    def __init__(self) -> None:
        self.requests = Counter(
            "greenroom_requests",
            "Requests by HTTP status, as the replica that did the work saw them; 499 for a client that left.",
            ("tier", "operation", "status"),
        )
        self.overflow = Counter("greenroom_overflow", "Render-only requests that went to the engine tier.")
        self.broken_streams = Counter("greenroom_broken_streams", "Streams that ended with an error event.")
        self.retries = Counter(
            "greenroom_retries", "Requests tried again because a replica was lost, before any answer.", ("tier",)
        )
        self.continued_streams = Counter(
            "greenroom_continued_streams", "Generations that went on elsewhere after tokens had been sent."
        )
        self.borrowed_items = Counter(
            "greenroom_borrowed_items", "Items that the render tier processed for an engine replica.", ("outcome",)
        )
        self.items = Counter("greenroom_items", "Media items of rendered prompts.", ("tier", "kind"))
        self.stage = Histogram(
            "greenroom_stage_seconds", "What a request spent its time on.", STAGE_SECONDS, ("tier", "stage")
        )
        self.first_token = Histogram(
            "greenroom_time_to_first_token_seconds",
            "From a rendered prompt's submission to the engine to its first output.",
            FIRST_TOKEN_SECONDS,
        )
        self.between_tokens = Histogram(
            "greenroom_time_between_tokens_seconds", "From one output of a sequence to the next.", TOKEN_SECONDS
        )
        self.prompt_tokens = Counter("greenroom_prompt_tokens", "Of generations, images' placeholders included.")
        self.cached_tokens = Counter("greenroom_cached_tokens", "Prompt tokens that the prefix cache served.")
        self.output_tokens = Counter("greenroom_output_tokens", "Tokens generated.")
        self.cache_totals = {
            name: Counter(f"greenroom_cache_{name}", text, ("cache",)) for name, text in CACHE_TOTALS.items()
        }
        self.cache_levels = {
            name: Gauge(f"greenroom_cache_{name}", text, ("cache",)) for name, text in CACHE_LEVELS.items()
        }
        self.engine_totals = {name: Counter(f"greenroom_engine_{name}", text) for name, text in ENGINE_TOTALS.items()}
        self.engine_levels = {name: Gauge(f"greenroom_engine_{name}", text) for name, text in ENGINE_LEVELS.items()}
        self.under_way = Gauge(
            "greenroom_under_way", "What is under way now: see `ReplicaReport.under_way`.", ("what",)
        )
        self.warmup = Gauge("greenroom_warmup_seconds", "Of this replica's start, by step.", ("tier", "step"))
        self.warm_to_first_request = Gauge(
            "greenroom_warm_to_first_request_seconds", "From the end of warm-up to the first request.", ("tier",)
        )
        self.first_request = Gauge(
            "greenroom_first_request_seconds", "How long the replica's first request took.", ("tier",)
        )


def metrics() -> Metrics:
    """This process's instruments, made at first use: by then a replica knows its name."""
    return _made() if _silences == 0 else cast(Metrics, _SILENT)


@cache
def _made() -> Metrics:
    return Metrics()


class _Silent:
    """Instruments that count nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any, **named: Any) -> None:
        return None


_SILENT = _Silent()
_silences = 0


@contextmanager
def silence() -> Iterator[None]:
    """Count nothing in this process meanwhile: it answers itself, before anybody can reach it."""
    global _silences
    _made()
    _silences += 1
    try:
        yield
    finally:
        _silences -= 1


def observe_stages(tier: str, seconds: Mapping[str, float]) -> None:
    for stage, spent in seconds.items():
        metrics().stage.observe(spent, {"tier": tier, "stage": stage})


def count_items(tier: str, prompts: Sequence[RenderedPrompt], processed: bool) -> None:
    """Count the items of prompts.

    Args:
        processed: Whether tensors were asked for, of a processor or of its cache; False for layouts.
    """
    tags = {"tier": tier, "kind": "processed" if processed else "layout"}
    count(metrics().items, sum(len(prompt.items) for prompt in prompts), tags)


async def measured(outputs: AsyncGenerator[EngineOutput]) -> AsyncGenerator[EngineOutput]:
    """The outputs of one sequence as they are, their times and tokens counted."""
    ours, last, histogram = metrics(), time.perf_counter(), metrics().first_token
    async with aclosing(outputs) as source:
        async for output in source:
            now = time.perf_counter()
            histogram.observe(now - last)
            last, histogram = now, ours.between_tokens
            count(ours.output_tokens, len(output.token_ids))
            yield output


def count(counter: Any, amount: float, tags: dict[str, str] | None = None) -> None:
    """Add an amount that may be nothing."""
    if amount > 0:
        counter.inc(amount, tags)


class Growth:
    """By how much totals have grown since they were looked at; one that is smaller than before has begun anew."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], float] = {}

    def of(self, key: tuple[str, str], total: float) -> float:
        before = self._seen.get(key, 0.0)
        self._seen[key] = total
        return total - before if total >= before else total


class Sampler:
    """Tells the totals and levels that a replica's report holds."""

    def __init__(self) -> None:
        self._growth = Growth()

    def tell(self, report: ReplicaReport) -> None:
        _tell_start(report)
        ours = metrics()
        for cache_name, stats in report.caches.items():
            tags = {"cache": cache_name}
            for name, counter in ours.cache_totals.items():
                count(counter, self._growth.of((name, cache_name), getattr(stats, name)), tags)
            for name, gauge in ours.cache_levels.items():
                gauge.set(getattr(stats, name), tags)
        if report.engine is not None:
            for name, counter in ours.engine_totals.items():
                count(counter, self._growth.of((name, ""), getattr(report.engine, name)))
            for name, gauge in ours.engine_levels.items():
                gauge.set(getattr(report.engine, name))
        for what, level in report.under_way.items():
            ours.under_way.set(level, {"what": what})


def _tell_start(report: ReplicaReport) -> None:
    """Again and again, what does not change any more: Ray forgets a gauge that nobody sets."""
    ours, tags = metrics(), {"tier": report.tier}
    for step, seconds in report.warmup_s.items():
        ours.warmup.set(seconds, {**tags, "step": step})
    if report.first_request_s is not None:
        ours.first_request.set(report.first_request_s, tags)
    if report.first_request_at is not None and report.warmup_ended_at is not None:
        ours.warm_to_first_request.set(report.first_request_at - report.warmup_ended_at, tags)


async def sample(report: Callable[[], Awaitable[ReplicaReport]]) -> None:
    """Tell a replica's levels and totals for as long as it lives."""
    sampler = Sampler()
    while True:
        try:
            sampler.tell(await report())
        except Exception:
            logger.warning("this replica's levels could not be told", exc_info=True)
        await asyncio.sleep(SAMPLE_PERIOD_S)

"""Render-only work on one renderer, as the replicas of both tiers do it. Nothing here touches a sender cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.autoscaling import SECONDS_PER_REQUEST, Gauge
from deployments.calls import RenderCall, Rendering, Reply, Served, TokenizeCall, Tokenized
from deployments.metrics import count_items, observe_stages
from deployments.records import Record
from deployments.render_answers import ItemCodec, render_answer
from deployments.sampling import resolve
from deployments.work import call_seconds
from engine.protocol import SamplingParams
from renderer.caches import CacheStats, MediaCache
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, CompletionRequest
from renderer.prompt import RenderedPrompt
from renderer.renderer import Renderer

T = TypeVar("T")


class Clock:
    """Seconds of the stages of one request, each from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


class RenderOnly:
    """What a replica of either tier offers of its renderer; the work runs in the renderer's threads."""

    def __init__(self, renderer: Renderer, record: Record) -> None:
        self.renderer = renderer
        self.record = record
        self._codec = ItemCodec(renderer.family.fields, renderer.float_type)
        self.waiting = Gauge()  # seconds of work

    async def render(self, call: RenderCall) -> Reply[tuple[RenderedPrompt, ...]]:
        """The prompts of a request, with tensors as numpy arrays where the call wants them."""
        return await self._run("render", lambda clock: self._rendered(call, clock), call)

    async def render_json(self, call: RenderCall) -> Reply[NDArray[np.uint8]]:
        """The HTTP answer to a render-only request: its bytes in an array, which crosses to the router uncopied."""

        def work(clock: Clock) -> NDArray[np.uint8]:
            prompts = self._rendered(call, clock)
            params = [self._params(call, prompt) for prompt in prompts]
            answer = render_answer(call, prompts, params, self._codec)
            clock.lap("write")
            return np.frombuffer(answer, np.uint8)

        return await self._run("render", work, call)

    async def tokenize(self, call: TokenizeCall) -> Reply[Tokenized]:
        """Token ids of a text, or of a conversation with its placeholders expanded; no pixel is touched."""

        def work(clock: Clock) -> Tokenized:
            if isinstance(call.request, str):
                ids = tuple(self.renderer.tokenize(call.request, call.add_special_tokens))
            else:
                ids = self.renderer.layout(call.request).token_ids
            pieces = self.renderer.tokenizer.pieces(ids) if call.token_strs else None
            clock.lap("render")
            return Tokenized(ids, None if pieces is None else tuple(pieces), self.renderer.max_model_len)

        return await self._run("tokenize", work, call)

    async def detokenize(self, token_ids: tuple[int, ...]) -> Reply[str]:
        """The text of token ids, special tokens included."""

        def work(clock: Clock) -> str:
            text = self.renderer.detokenize(token_ids)
            clock.lap("render")
            return text

        return await self._run("detokenize", work)

    async def clear_mm_cache(self) -> None:
        """Empty the processors' caches."""
        self.renderer.clear_mm_cache()

    @property
    def caches(self) -> Mapping[str, CacheStats]:
        """Statistics of the processors' caches: `sender` of the engine path, `processor` of the readonly one."""
        named = {"sender": self.renderer.mm_processor.cache, "processor": self.renderer.readonly_mm_processor.cache}
        return {name: cache.stats for name, cache in named.items() if cache is not None}

    async def _run(
        self, operation: str, work: Callable[[Clock], T], call: RenderCall | TokenizeCall | None = None
    ) -> Reply[T]:
        clock = Clock()
        seconds = SECONDS_PER_REQUEST if call is None else call_seconds(call, headers=True)

        def timed() -> T:
            clock.lap("queue")
            return work(clock)

        with self.record.request(operation), self.waiting.under_way(seconds):
            value = await self.renderer.request_pool.run(timed)
        observe_stages(self.record.tier, clock.seconds)
        return Reply(value, Served(self.record.tier, self.record.replica, clock.seconds))

    def _rendered(self, call: RenderCall, clock: Clock) -> tuple[RenderedPrompt, ...]:
        prompts = rendered(self.renderer, call.request, call.skip_mm_cache, call.tensors)
        clock.lap("render")
        count_items(self.record.tier, prompts, call.tensors)
        return tuple(prompt.without_lease() for prompt in prompts)

    def _params(self, call: RenderCall, prompt: RenderedPrompt) -> SamplingParams:
        defaults, length = self.renderer.generation_defaults, len(prompt.token_ids)
        return resolve(call.sampling, defaults, length, self.renderer.max_model_len)


async def warm_renderer(config: RendererConfig, record: Record, sender_cache: MediaCache | None = None) -> Renderer:
    """A renderer whose every thread is warm; the seconds of each step go into the record.

    Raises:
        ConfigError: The checkpoint cannot be served.
        WarmupError: A step failed, and the configuration says `warmup: strict`.
    """
    # Items are processed in parallel; threads within an item would only compete with those.
    torch.set_num_threads(1)
    renderer = await asyncio.to_thread(Renderer, config, sender_cache)
    try:
        report = await asyncio.to_thread(renderer.warmup)
    except BaseException:
        renderer.close()
        raise
    record.add_steps(report.steps)
    return renderer


def rendered(
    renderer: Renderer, request: Rendering, skip_mm_cache: bool, tensors: bool = True
) -> tuple[RenderedPrompt, ...]:
    """The prompts of any kind of request, one except for completions."""
    if isinstance(request, CompletionRequest):
        return renderer.render_completion(request, skip_mm_cache)
    if not tensors:
        prompt = renderer.layout(request)
        renderer.check_length(prompt)
        return (prompt,)
    if isinstance(request, ChatRequest):
        return (renderer.render_chat(request, skip_mm_cache),)
    return (renderer.render_tokens(request, skip_mm_cache),)

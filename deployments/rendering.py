"""Render-only work on one renderer, as the replicas of both tiers do it. Nothing here touches a sender cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from deployments.answers.pieces import ArrayPieces, Pieces, as_arrays
from deployments.answers.rendered import ItemCodec, render_answer
from deployments.answers.texts import derendered
from deployments.autoscaling import SECONDS_PER_REQUEST, Gauge
from deployments.calls import (
    BorrowCall,
    DerenderCall,
    Derendered,
    GenerateCall,
    RenderCall,
    Rendering,
    Reply,
    Served,
    TokenizeCall,
    Tokenized,
)
from deployments.metrics import count_items, observe_stages
from deployments.records import Record
from deployments.sampling import resolve
from deployments.work import call_seconds, item_seconds
from engine.protocol import SamplingParams
from renderer.caches import CacheStats, MediaCache, ProcessedItem
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, CompletionRequest, FeaturesRequest, TokensRequest, media_of
from renderer.fetch import MediaFetcher
from renderer.items import ItemSource
from renderer.offsets import Offsets, token_offsets
from renderer.prompt import RenderedPrompt
from renderer.remote_media import with_media
from renderer.renderer import Renderer

T = TypeVar("T")
CallT = TypeVar("CallT", RenderCall, TokenizeCall)
# Work of less than this, by estimate, is done on the event loop: handing it to a thread costs a good part of it.
INLINE_SECONDS = 0.003
# Reading a header takes 0.1 ms, and some milliseconds where a file is made to take long.
INLINE_IMAGES = 4
# As large as an answer with the tensors of a few images.
REHEARSED_BYTES = 8 * 1024 * 1024
MediaCallT = TypeVar("MediaCallT", RenderCall, TokenizeCall, GenerateCall)


class Clock:
    """Seconds of the stages of one request, each from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


@dataclass(frozen=True, slots=True)
class ItemSources:
    """Who computes what the caches of a renderer's two processors lack; None: its own threads."""

    mm: ItemSource | None = None
    readonly: ItemSource | None = None


class RenderOnly:
    """What a replica of either tier offers of its renderer; the work runs in the renderer's threads.

    Images that a request names by their addresses are fetched here, so that the rules are kept in one place.
    """

    fetcher: MediaFetcher | None = None  # until the constructor has come to it

    def __init__(self, renderer: Renderer, record: Record) -> None:
        self.renderer = renderer
        self.record = record
        self.fetcher = MediaFetcher(renderer.config.fetch, renderer.config.max_image_bytes)
        self._codec = ItemCodec(renderer.family.fields, renderer.float_type)
        self.waiting = Gauge()  # seconds of work

    async def render(self, call: RenderCall) -> Reply[tuple[RenderedPrompt, ...]]:
        """The prompts of a request, with tensors as numpy arrays where the call wants them."""
        return await self._run("render", call, self._rendered)

    async def rehearse(self, call: RenderCall) -> Reply[ArrayPieces]:
        """An answer as large as the call's may be, for a router that opens its ways: nothing is done or counted."""
        size = REHEARSED_BYTES if _touches_pixels(call) else 1
        return Reply((np.zeros(size, np.uint8),), Served(self.record.tier, self.record.replica))

    async def render_answer(self, call: RenderCall) -> Reply[ArrayPieces]:
        """The HTTP answer to a render-only request, in arrays, which the router reads where they lie."""
        reply = await self.answer_pieces(call)
        return Reply(as_arrays(reply.value), reply.served)

    async def answer_pieces(self, call: RenderCall) -> Reply[Pieces]:
        """The HTTP answer to a render-only request, for this process to send."""

        def work(call: RenderCall, clock: Clock) -> Pieces:
            prompts = self._rendered(call, clock)
            params = [self._params(call, prompt) for prompt in prompts]
            answer = render_answer(call, prompts, params, self._codec, self._offsets(call))
            clock.lap("write")
            return answer

        return await self._run("render", call, work)

    async def tokenize(self, call: TokenizeCall) -> Reply[Tokenized]:
        """Token ids of a text, or of a conversation with its placeholders expanded; no pixel is touched."""

        def work(call: TokenizeCall, clock: Clock) -> Tokenized:
            if isinstance(call.request, str):
                ids = tuple(self.renderer.tokenize(call.request, call.add_special_tokens))
            else:
                ids = self.renderer.layout(call.request).token_ids
            pieces = self.renderer.tokenizer.pieces(ids) if call.token_strs else None
            clock.lap("render")
            return Tokenized(ids, None if pieces is None else tuple(pieces), self.renderer.max_model_len)

        return await self._run("tokenize", call, work)

    async def detokenize(self, token_ids: tuple[int, ...]) -> Reply[str]:
        """The text of token ids, special tokens included."""

        clock = Clock()

        def work() -> str:
            text = self.renderer.detokenize(token_ids)
            clock.lap("render")
            return text

        with self.record.request("detokenize"):
            return await self._in_thread(work, clock, SECONDS_PER_REQUEST)

    async def process_item(self, call: BorrowCall) -> ProcessedItem:
        """One item for another replica. Not beside an engine, whose sender cache nobody else may ask.

        Raises:
            MediaError: It is corrupt, or the model cannot take it.
        """
        renderer, item = self.renderer, call.item
        processor = renderer.readonly_mm_processor if call.skip_mm_cache else renderer.mm_processor
        family = renderer.family.with_options(item.options)
        seconds = 0.0 if call.counted else item_seconds(item)
        with self.record.request("borrowed"), self.waiting.under_way(seconds):
            return await asyncio.wrap_future(processor.submit(item, family))

    async def derender(self, call: DerenderCall) -> Reply[tuple[Derendered, ...]]:
        """The texts of outputs, or of chunks of them."""
        clock = Clock()

        def work() -> tuple[Derendered, ...]:
            texts = derendered(self.renderer, call)
            clock.lap("derender")
            return texts

        with self.record.request("derender"):
            return await self._in_thread(work, clock, SECONDS_PER_REQUEST)

    async def clear_mm_cache(self) -> None:
        """Empty the processors' caches."""
        self.renderer.clear_mm_cache()

    @property
    def caches(self) -> Mapping[str, CacheStats]:
        """Statistics of the processors' caches: `sender` of the engine path, `processor` of the readonly one."""
        named = {"sender": self.renderer.mm_processor.cache, "processor": self.renderer.readonly_mm_processor.cache}
        return {name: cache.stats for name, cache in named.items() if cache is not None}

    def close(self) -> None:
        """Close the connections to the hosts of images. Fetches under way fail."""
        if self.fetcher is not None:
            self.fetcher.close()

    def __del__(self) -> None:
        # Called by Serve on the replica's event loop, once the last request has ended.
        self.close()

    async def _run(self, operation: str, call: CallT, work: Callable[[CallT, Clock], T]) -> Reply[T]:
        """The result of `work` on a call, whose media are fetched before it takes a thread."""
        clock = Clock()
        with self.record.request(operation):
            async with self._fetched(call, clock) as ready:
                seconds = call_seconds(ready, headers=True)
                if seconds > INLINE_SECONDS or _touches_pixels(ready) or len(media_of(ready.request)) > INLINE_IMAGES:
                    return await self._in_thread(lambda: work(ready, clock), clock, seconds)
                return self._reply(work(ready, clock), clock)

    async def _in_thread(self, work: Callable[[], T], clock: Clock, seconds: float) -> Reply[T]:
        def timed() -> T:
            clock.lap("queue")
            return work()

        with self.waiting.under_way(seconds):
            value = await self.renderer.request_pool.run(timed)
        return self._reply(value, clock)

    def _reply(self, value: T, clock: Clock) -> Reply[T]:
        observe_stages(self.record.tier, clock.seconds)
        return Reply(value, Served(self.record.tier, self.record.replica, clock.seconds))

    @asynccontextmanager
    async def _fetched(self, call: MediaCallT, clock: Clock) -> AsyncIterator[MediaCallT]:
        """The call with the bytes of its media; what can be refused without them is refused before."""
        request = call.request
        if isinstance(request, (str, FeaturesRequest)) or self.fetcher is None or not _is_remote(request):
            yield call
            return
        self.renderer.check(request)
        async with with_media(request, self.fetcher) as filled:
            clock.lap("fetch")
            yield replace(call, request=filled)

    def _rendered(self, call: RenderCall, clock: Clock) -> tuple[RenderedPrompt, ...]:
        prompts = rendered(self.renderer, call.request, call.skip_mm_cache, call.tensors)
        clock.lap("render")
        count_items(self.record.tier, prompts, call.tensors)
        return tuple(prompt.without_lease() for prompt in prompts)

    def _offsets(self, call: RenderCall) -> tuple[Offsets | None, ...] | None:
        if not call.envelope.token_offsets or isinstance(call.request, TokensRequest):
            return None
        return token_offsets(self.renderer, call.request)

    def _params(self, call: RenderCall, prompt: RenderedPrompt) -> SamplingParams:
        defaults, length = self.renderer.generation_defaults, len(prompt.token_ids)
        longest = self.renderer.max_model_len
        return resolve(call.sampling, defaults, length, min(longest, call.max_model_len or longest))


def _touches_pixels(call: RenderCall | TokenizeCall) -> bool:
    return isinstance(call, RenderCall) and call.tensors and bool(media_of(call.request))


def _is_remote(request: Rendering) -> bool:
    """Whether an image has to be fetched."""
    return any(image.is_remote for image in media_of(request))


async def warm_renderer(
    config: RendererConfig, record: Record, sources: ItemSources, sender_cache: MediaCache | None = None
) -> Renderer:
    """A renderer whose every thread is warm; the seconds of each step go into the record.

    Raises:
        ConfigError: The checkpoint cannot be served.
        WarmupError: A step failed, and the configuration says `warmup: strict`.
    """
    # Items are processed in parallel; threads within an item would only compete with those.
    torch.set_num_threads(1)
    renderer = await asyncio.to_thread(Renderer, config, sender_cache, sources.mm, sources.readonly)
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

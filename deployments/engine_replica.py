"""The engine tier: a renderer beside an engine, coupled through the sender cache."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any, cast

from deployments.autoscaling import ENGINE_PROMPT_TOKENS, ENGINE_SEQUENCES, Gauge
from deployments.borrowing.helpers import Helpers
from deployments.borrowing.render_tier import RenderTier
from deployments.borrowing.rule import BorrowRule
from deployments.calls import Choice, Delta, Event, GenerateCall, ReplicaReport, Served, Started
from deployments.config import EngineTierConfig
from deployments.generation import ChoiceText, Silent, choice_params, deltas, merge
from deployments.logs import log_facts
from deployments.metrics import count, count_items, measured, metrics, observe_stages
from deployments.records import Record, application
from deployments.rehearsal import rehearse_rendering
from deployments.rendering import Clock, ItemSources, RenderOnly, rendered, warm_renderer
from deployments.sampling import resolve
from deployments.tier import Operation, Tiers, choose_tier
from deployments.weights.control import Control, PauseMode, engine_id
from deployments.weights.replica import ReplicaWeights
from deployments.weights.wanted import Weights, WeightsRecord
from engine.backends import CoupledEngine, make_engine
from engine.protocol import EngineOutput, SamplingParams
from renderer.conversation import FeaturesRequest
from renderer.errors import CacheMissError, EngineDeadError, EngineStartingError
from renderer.prompt import RenderedPrompt

# Of one prompt. Where a cache holds a few images and many clients ask for others, one in three look-ups is in vain. The
# last rendering looks nothing up.
MAX_RENDERINGS = 8


class EngineReplica(RenderOnly):
    """One engine replica. It is warm before anybody can reach it: Serve waits for the constructor.

    Args:
        render: Handle of the render tier, which processes items for this replica; None: nobody does.
        engine: Takes the place of the configured one.

    Raises:
        WarmupError, EngineError: It cannot serve. Serve shows the reason in the deployment's status.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineTierConfig, render: Any = None, engine: CoupledEngine | None = None
    ) -> None:
        record = Record("engine")
        self.engine = make_engine(config.engine) if engine is None else engine
        self.control = Control(self.engine)
        kept = WeightsRecord(application(), config.renderer.model)
        self.weights = ReplicaWeights(self.engine, self.control, kept)
        self._restart_s = config.restart_s
        self._down_since: float | None = None
        self._sequences, self._prompt_tokens, self._decoding = Gauge(), Gauge(), Gauge()
        self._helpers = None if render is None else self._borrow(config, render)
        try:
            begun = time.perf_counter()
            await self.engine.start()
            record.add_steps({"engine": time.perf_counter() - begun})
            renderer = await warm_renderer(config.renderer, record, self._sources(), self.engine.sender_cache)
            super().__init__(renderer, record)
            await rehearse_rendering(self)
            begun = time.perf_counter()
            if await self.weights.begin():
                record.add_steps({"weights": time.perf_counter() - begun})
        except BaseException:
            await self.engine.close()
            raise
        record.warm()
        if self._helpers is not None:
            self._helpers.open()
        record.tell(self.report)  # asks the engine every few seconds, which is how one that hangs is found

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Event]:
        """Render a prompt on the engine path and stream its choices; `Started` comes with the first token.

        Raises:
            RequestError: The prompt cannot be rendered or run.
            EngineStartingError: The engine is not up, nothing was submitted.
            EngineDeadError: The engine died; what was streamed is valid.
        """
        await self._check_engine()
        with (
            self.record.request("generate"),
            self._sequences.under_way(len(call.choices)),
            self.control.under_way(call),
        ):
            clock = Clock()
            async with self._fetched(call, clock) as ready, aclosing(self._events(ready, clock)) as events:
                async for event in events:
                    yield event

    async def _events(self, call: GenerateCall, clock: Clock) -> AsyncGenerator[Event]:
        prompts = await self._prompts(call)
        cached = 0
        clock.lap("render")
        with ExitStack() as waiting, ExitStack() as decoding:
            waiting.enter_context(self._prompt_tokens.under_way(len(prompts[0].token_ids)))
            try:
                texts = [self._text(call, choice, prompts[0]) for choice in call.choices]
                async with aclosing(self._deltas(call, prompts, texts)) as new:
                    async for delta in new:
                        if "first_token" not in clock.seconds:
                            clock.lap("first_token")
                            waiting.close()
                            decoding.enter_context(self._decoding.under_way(len(call.choices)))
                            served = Served(self.record.tier, self.record.replica, clock.seconds)
                            cached = _cached_tokens(texts)
                            self._count(prompts[0], clock, cached)
                            yield _started(call, served, prompts[0], cached, self.weights.version)
                        late = _cached_tokens(texts) - cached
                        if late:
                            cached += late
                            count(metrics().cached_tokens, late)
                            delta = replace(delta, late_cached_tokens=late)
                        yield delta
            finally:
                for prompt in prompts:
                    _release(prompt)

    def _count(self, prompt: RenderedPrompt, clock: Clock, cached: int) -> None:
        observe_stages(self.record.tier, clock.seconds)
        count_items(self.record.tier, [prompt], True)
        count(metrics().prompt_tokens, len(prompt.token_ids))
        count(metrics().cached_tokens, cached)
        facts = {"prompt_tokens": len(prompt.token_ids), "cached_tokens": cached, "items": len(prompt.items)}
        log_facts("generation has begun", facts | {f"{stage}_s": spent for stage, spent in clock.seconds.items()})

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together that renderer and engine both take."""
        return min(self.renderer.max_model_len, self.engine.max_model_len)

    async def report(self) -> ReplicaReport:
        """This replica's record, its caches' and its engine's statistics."""
        under_way = {"sequences": self._sequences.level, "prompt_tokens": self._prompt_tokens.level}
        under_way["render_seconds"] = self.waiting.level
        items = {} if self._helpers is None else self._helpers.counts
        report = self.record.report(self.max_model_len, self.caches, await self.engine.stats(), under_way, items)
        return replace(report, weights=self.weights.version)

    async def clear_mm_cache(self) -> None:
        """Empty the processors' caches, and with them what the engine holds."""
        await super().clear_mm_cache()
        await self.engine.reset_cache()

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests by their clients' ids; their streams finish with the reason `abort`."""
        await self.control.abort(request_ids)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: sequences under way, and tokens of the prompts that wait for their first output."""
        return {ENGINE_SEQUENCES: self._sequences.mean(), ENGINE_PROMPT_TOKENS: self._prompt_tokens.mean()}

    async def check_health(self) -> None:
        """Fail once the engine has been down for longer than it may take to restart.

        Raises:
            EngineDeadError: It has.
            EngineError: The weights that the application wants cannot be taken.
        """
        self.weights.follow()
        self.weights.check()
        try:
            await self.engine.health()
            self._down_since = None
        except EngineDeadError:
            self._down_since = self._down_since or time.monotonic()
            if time.monotonic() - self._down_since > self._restart_s:
                raise

    async def pause(self, mode: PauseMode) -> None:
        """Hold new generations back and wait until the engine has none."""
        await self.weights.pause(mode)

    async def reload(self, weights: Weights) -> None:
        """See `ReplicaWeights.reload`."""
        await self.weights.reload(weights)

    async def resume(self, weights: Weights) -> None:
        """See `ReplicaWeights.resume`."""
        await self.weights.resume(weights)

    def _borrow(self, config: EngineTierConfig, render: Any) -> Helpers:
        remote = self.engine.sender_cache is None
        tiers = Tiers(render=True, engine="remote" if remote else config.engine.backend)
        skip_mm_cache = choose_tier(Operation.BORROWED, tiers).skip_mm_cache or False
        tier = RenderTier(lambda: render, skip_mm_cache)
        rule = BorrowRule(config.borrow, config.helpers.min_pixels)
        threads = config.renderer.media_threads
        copies = remote and config.renderer.processor_cache_bytes > 0
        return Helpers(tier, rule, threads, config.helpers, lambda: self._decoding.level, copies)

    def _sources(self) -> ItemSources:
        """Items are borrowed by the processor that renders for the engine alone."""
        remote = self.engine.sender_cache is None
        return ItemSources(None if remote else self._helpers, self._helpers if remote else None)

    async def _check_engine(self) -> None:
        try:
            await self.engine.health()
        except EngineDeadError as error:
            raise EngineStartingError(error.message) from error

    async def _render(self, call: GenerateCall) -> RenderedPrompt:
        """The one prompt of a call, its items pinned; whoever gets it closes its lease."""
        request = call.request

        def work() -> RenderedPrompt:
            if isinstance(request, FeaturesRequest):
                return self.renderer.receive(request)
            return rendered(self.renderer, request, call.skip_mm_cache)[0]

        prompt: RenderedPrompt = await self.renderer.request_pool.run(work, first=True, discard=_release)
        return prompt

    async def _prompts(self, call: GenerateCall) -> list[RenderedPrompt]:
        """The prompt once for each choice, every one with pins of its own for its engine stream to release."""
        prompt = await self._render(call)
        return [prompt, *(_pinned_again(prompt) for _ in call.choices[1:])]

    async def _deltas(
        self, call: GenerateCall, prompts: Sequence[RenderedPrompt], texts: Sequence[ChoiceText]
    ) -> AsyncGenerator[Delta]:
        """The deltas of all choices as they come."""
        defaults, length = self.renderer.generation_defaults, len(prompts[0].token_ids)
        params = resolve(call.sampling, defaults, length, self.max_model_len)
        streams = [
            deltas(self._outputs(call, choice, prompt, params), text, call.every)
            for choice, prompt, text in zip(call.choices, prompts, texts, strict=True)
        ]
        async with aclosing(merge(streams)) as merged:
            async for delta in merged:
                yield delta

    def _text(self, call: GenerateCall, choice: Choice, prompt: RenderedPrompt) -> ChoiceText:
        sampling = call.sampling
        if not sampling.detokenize:
            return ChoiceText(choice, sampling, Silent(), lambda token_ids: "")
        detokenizer = self.renderer.detokenizer(
            prompt.token_ids,
            stop=sampling.stop,
            skip_special_tokens=sampling.skip_special_tokens,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )
        return ChoiceText(choice, sampling, detokenizer, self.renderer.detokenize)

    async def _outputs(
        self, call: GenerateCall, choice: Choice, prompt: RenderedPrompt, params: SamplingParams
    ) -> AsyncGenerator[EngineOutput]:
        """One choice's outputs.

        An engine that restarted after the prompt was rendered lacks the items that came without tensors; vLLM, whose
        cache knows no pins, may have dropped them by then: nothing has been generated, and the prompt is rendered anew,
        the last time with all its tensors.

        Raises:
            CacheMissError: An item came by its name alone, and is not held.
        """
        request_id = engine_id(call, choice.index)
        own = choice_params(params, choice.index % call.sampling.n)
        for left in reversed(range(MAX_RENDERINGS)):
            try:
                submit = partial(self._generate, prompt, own, request_id, choice.prior_output_ids)
                async with aclosing(self.control.run(call, request_id, submit)) as outputs:
                    async for output in outputs:
                        yield output
                return
            except CacheMissError:
                if not left:
                    raise
            finally:
                _release(prompt)  # also where it was never submitted
            prompt = await self._render(call if left > 1 else replace(call, skip_mm_cache=True))

    def _generate(
        self, prompt: RenderedPrompt, params: SamplingParams, request_id: str, prior: tuple[int, ...]
    ) -> AsyncGenerator[EngineOutput]:
        outputs = self.engine.generate(prompt, params, request_id=request_id, prior_output_ids=prior)
        return measured(cast(AsyncGenerator[EngineOutput], outputs))


def _cached_tokens(texts: Sequence[ChoiceText]) -> int:
    """Prompt tokens of the prefix cache, as far as the engine has told."""
    return max(text.cached_tokens for text in texts)


def _started(call: GenerateCall, served: Served, prompt: RenderedPrompt, cached: int, weights: str) -> Started:
    started = Started(served, len(prompt.token_ids), cached, weights)
    if not call.return_prompt:
        return started
    return replace(started, token_ids=prompt.token_ids, ranges=tuple(item.range for item in prompt.items))


def _pinned_again(prompt: RenderedPrompt) -> RenderedPrompt:
    """The same prompt with pins of its own."""
    if prompt.lease is None:
        return prompt
    lease = prompt.lease.cache.lease()
    for key in prompt.lease.keys:
        prompt.lease.cache.look_up(key, lease)
    return replace(prompt, lease=lease)


def _release(prompt: RenderedPrompt) -> None:
    if prompt.lease is not None:
        prompt.lease.close()

"""Token ids become text: the stream of one choice out of an engine, and several such streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol, TypeVar

from deployments.calls import Choice, Delta, LogprobEntry, SamplingRequest
from engine.protocol import EngineOutput, SamplingParams
from renderer.spelling import Decode, Spelling

T = TypeVar("T")


class Detokenizer(Protocol):
    """What a choice needs of `renderer.detokenizer.IncrementalDetokenizer`."""

    @property
    def stop_reason(self) -> str | None: ...

    def feed(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class Silent:
    """The detokenizer of a choice that nobody wants as text."""

    stop_reason = None

    def feed(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


class ChoiceText:
    """Text and bookkeeping of one choice.

    The text after k tokens is a function of these k tokens, so a choice that another replica began goes on by feeding
    that replica's tokens first and sending nothing of their text.
    """

    def __init__(
        self,
        choice: Choice,
        sampling: SamplingRequest,
        detokenizer: Detokenizer,
        decode: Decode,
    ) -> None:
        self.index = choice.index
        self.finished = False
        self.cached_tokens = 0
        self._sampling = sampling
        self._detokenizer = detokenizer
        self._spelling = Spelling(decode, choice.prior_output_ids)
        if choice.prior_output_ids:
            detokenizer.feed(choice.prior_output_ids)

    def feed(self, output: EngineOutput) -> Delta:
        """What an output adds. The text of the token that ends a choice is left out, as is all after a stop string."""
        ids = output.token_ids
        self.cached_tokens = max(self.cached_tokens, output.num_cached_tokens)
        shown = self._shown(output)
        text, used = self._detokenize(shown)
        stop: int | str | None = self._detokenizer.stop_reason
        if stop is not None:
            self.finished = True
            return self._delta(output, text, ids[:used], "stop", stop)
        if output.finish_reason is not None:
            self.finished = True
            text += self._detokenizer.finish()
            return self._delta(output, text, ids, output.finish_reason, output.stop_reason)
        return self._delta(output, text, ids, None, None)

    def _shown(self, output: EngineOutput) -> tuple[int, ...]:
        """The tokens that become text; an end-of-sequence or stop token only on request."""
        shown = self._sampling.include_stop_str_in_output or output.last_is_text
        ended = output.finish_reason == "stop" and not shown
        return output.token_ids[:-1] if ended else output.token_ids

    def _detokenize(self, token_ids: tuple[int, ...]) -> tuple[str, int]:
        """The text, and how many tokens it took: with stop strings one by one, to know which token completed one."""
        if not self._sampling.stop:
            return self._detokenizer.feed(token_ids), len(token_ids)
        text = ""
        for used, token_id in enumerate(token_ids, 1):
            text += self._detokenizer.feed((token_id,))
            if self._detokenizer.stop_reason is not None:
                return text, used
        return text, len(token_ids)

    def _delta(
        self, output: EngineOutput, text: str, ids: tuple[int, ...], finish: str | None, stop: int | str | None
    ) -> Delta:
        logprobs = tuple(LogprobEntry.of(entry, self._spelling) for entry in output.logprobs[: len(ids)])
        return Delta(self.index, text, ids, finish, stop, logprobs)


async def deltas(outputs: AsyncIterator[EngineOutput], text: ChoiceText, every: int) -> AsyncGenerator[Delta]:
    """The deltas of one choice, each of at least `every` tokens but the last; ends where a stop string does."""
    pending: Delta | None = None
    async for output in outputs:
        delta = text.feed(output)
        pending = delta if pending is None else join(pending, delta)
        if text.finished or len(pending.token_ids) >= every:
            yield pending
            pending = None
        if text.finished:
            return


def join(first: Delta, second: Delta) -> Delta:
    """Two deltas of a choice, one directly after the other, as one."""
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        late_cached_tokens=first.late_cached_tokens + second.late_cached_tokens,
    )


def choice_params(params: SamplingParams, index: int) -> SamplingParams:
    """Every choice of a seeded request draws its own numbers, the same whichever replica makes it."""
    return params if params.seed is None else replace(params, seed=params.seed + index)


async def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Items of all streams as they come. One stream's error ends all; when the reader leaves, all are closed."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as items:
            async for item in items:
                yield item
        return
    queue: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue(maxsize=len(streams))
    tasks = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        open_streams = len(tasks)
        while open_streams:
            match await queue.get():
                case None:
                    open_streams -= 1
                case (item,):
                    yield item
                case BaseException() as error:
                    raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncGenerator[T], queue: asyncio.Queue[tuple[T] | BaseException | None]) -> None:
    """Put a stream's items into the queue, wrapped so that they are told from its end and its error.

    A handle raises a cancellation, too, where the call that it made was cancelled and this task is not.
    """
    try:
        async with aclosing(stream) as items:
            async for item in items:
                await queue.put((item,))
        await queue.put(None)
    except BaseException as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        await queue.put(error)

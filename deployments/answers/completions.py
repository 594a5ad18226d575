"""The events of a generation become OpenAI answers: whole, or chunk by chunk."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from deployments.answers.openai import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    ChunkChoice,
    TextChoice,
    TextCompletion,
    Usage,
    chat_logprobs,
    text_logprobs,
    usage,
)
from deployments.calls import Delta, Event, Reply, Served, Started
from deployments.generation import join
from renderer.errors import EngineDeadError

A = TypeVar("A", covariant=True)
C = TypeVar("C", covariant=True)


@dataclass(frozen=True, slots=True)
class Head:
    """What every answer and chunk of one request begins with."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


class Form(Protocol[A, C]):
    """How whole answers (A) and chunks (C) of an operation look."""

    def start(self, event: Started) -> None:
        """The prompt is rendered, and the first token is there."""

    def whole(self, deltas: Mapping[int, Delta], usage: Usage) -> A: ...

    def chunk(self, delta: Delta, first: bool, offset: int, usage: Usage | None) -> C:
        """`first`: of its choice; `offset`: characters of the choice's text before it."""

    def last(self, usage: Usage) -> C:
        """The chunk without choices that carries the usage."""

    def shows(self, delta: Delta) -> bool:
        """Whether a reader learns anything from a delta that is not its choice's first."""


@dataclass(frozen=True, slots=True)
class _TextualForm:
    """Answers of text. Tokens that complete no character alone are only counted."""

    head: Head

    def start(self, event: Started) -> None:
        """Nothing of it is shown."""

    def shows(self, delta: Delta) -> bool:
        return bool(delta.text or delta.logprobs or delta.finish_reason)


@dataclass(frozen=True, slots=True)
class ChatForm(_TextualForm):
    def whole(self, deltas: Mapping[int, Delta], usage: Usage) -> ChatCompletion:
        choices = tuple(self._choice(deltas[index]) for index in sorted(deltas))
        return ChatCompletion(self.head.id, self.head.created, self.head.model, choices, usage)

    def chunk(self, delta: Delta, first: bool, offset: int, usage: Usage | None) -> ChatChunk:
        new = {"role": "assistant", "content": delta.text} if first else {"content": delta.text} if delta.text else {}
        logprobs = chat_logprobs(delta.logprobs)
        choice = ChunkChoice(delta.index, new, logprobs, delta.finish_reason, delta.stop_reason)
        return ChatChunk(self.head.id, self.head.created, self.head.model, (choice,), usage)

    def last(self, usage: Usage) -> ChatChunk:
        return ChatChunk(self.head.id, self.head.created, self.head.model, (), usage)

    @staticmethod
    def _choice(delta: Delta) -> ChatChoice:
        message = ChatMessage(delta.text)
        finish = delta.finish_reason or "stop"
        return ChatChoice(delta.index, message, chat_logprobs(delta.logprobs), finish, delta.stop_reason)


@dataclass(frozen=True, slots=True)
class TextForm(_TextualForm):
    def whole(self, deltas: Mapping[int, Delta], usage: Usage) -> TextCompletion:
        choices = tuple(self._choice(deltas[index], 0) for index in sorted(deltas))
        return TextCompletion(self.head.id, self.head.created, self.head.model, choices, usage)

    def chunk(self, delta: Delta, first: bool, offset: int, usage: Usage | None) -> TextCompletion:
        choices = (self._choice(delta, offset),)
        return TextCompletion(self.head.id, self.head.created, self.head.model, choices, usage)

    def last(self, usage: Usage) -> TextCompletion:
        return TextCompletion(self.head.id, self.head.created, self.head.model, (), usage)

    @staticmethod
    def _choice(delta: Delta, offset: int) -> TextChoice:
        logprobs = text_logprobs(delta.logprobs, offset)
        return TextChoice(delta.index, delta.text, logprobs, delta.finish_reason, delta.stop_reason)


class Tally:
    """Counts of one request, over all its prompts and choices."""

    def __init__(self) -> None:
        self.served: Served | None = None
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._output_tokens: defaultdict[int, int] = defaultdict(int)

    def start(self, event: Started) -> None:
        self.served = self.served or event.served
        self._prompt_tokens += event.prompt_tokens
        self._cached_tokens += event.cached_tokens

    def count(self, delta: Delta) -> None:
        self._output_tokens[delta.index] += len(delta.token_ids)
        self._cached_tokens += delta.late_cached_tokens

    def usage(self) -> Usage:
        cached = min(self._cached_tokens, self._prompt_tokens)  # two replicas may have told of one prompt
        return usage(self._prompt_tokens, sum(self._output_tokens.values()), cached)


async def whole(events: AsyncGenerator[Event], form: Form[A, Any]) -> Reply[A]:
    """The answer of a generation that is read to its end."""
    tally, deltas = Tally(), dict[int, Delta]()
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Started):
                tally.start(event)
                form.start(event)
                continue
            tally.count(event)
            deltas[event.index] = join(deltas[event.index], event) if event.index in deltas else event
    return Reply(form.whole(deltas, tally.usage()), _served(tally))


async def begun(
    events: AsyncGenerator[Event], form: Form[Any, C], *, include_usage: bool = False, continuous_usage: bool = False
) -> Reply[AsyncGenerator[C]]:
    """The chunks of a generation, once its first token is there: until then an error is still an answer of its own."""
    tally = Tally()
    async for event in events:
        if isinstance(event, Delta):
            break
        tally.start(event)
        form.start(event)
    else:
        raise EngineDeadError("the generation ended before its first token")
    return Reply(_Chunks(form, tally, continuous_usage).of(event, events, include_usage), _served(tally))


class _Chunks(Generic[C]):
    def __init__(self, form: Form[Any, C], tally: Tally, continuous_usage: bool) -> None:
        self._form = form
        self._tally = tally
        self._continuous_usage = continuous_usage
        self._offsets: dict[int, int] = {}

    async def of(self, first: Delta, rest: AsyncGenerator[Event], include_usage: bool) -> AsyncGenerator[C]:
        async with aclosing(rest):
            yield self._chunk(first)
            async for event in rest:
                if isinstance(event, Started):
                    self._tally.start(event)
                elif self._shows(event):
                    yield self._chunk(event)
                else:
                    self._tally.count(event)
        if include_usage:
            yield self._form.last(self._tally.usage())

    def _shows(self, delta: Delta) -> bool:
        return delta.index not in self._offsets or self._form.shows(delta)

    def _chunk(self, delta: Delta) -> C:
        self._tally.count(delta)
        first, offset = delta.index not in self._offsets, self._offsets.get(delta.index, 0)
        self._offsets[delta.index] = offset + len(delta.text)
        return self._form.chunk(delta, first, offset, self._tally.usage() if self._continuous_usage else None)


def _served(tally: Tally) -> Served:
    if tally.served is None:
        raise EngineDeadError("the generation ended before its first token")
    return tally.served

"""Generations under way on one engine replica, as others act on them: a client aborts one, a trainer holds all back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Literal

from deployments.calls import GenerateCall
from engine.protocol import Engine, EngineOutput

PauseMode = Literal["wait", "abort"]

# What answers put before a request's id.
PREFIXES = ("chatcmpl-", "cmpl-", "generate-tokens-")
_LOOK_AGAIN_S = 0.02


class Control:
    """Of one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: dict[object, GenerateCall] = {}
        self._aborted: set[str] = set()
        self._submitted: Counter[str] = Counter()
        self._paused = False
        self._news = asyncio.Condition()

    @property
    def is_paused(self) -> bool:
        return self._paused

    @contextmanager
    def under_way(self, call: GenerateCall) -> Iterator[None]:
        """Around everything that is done for a call: it can be aborted by its client's id meanwhile."""
        place = object()  # calls that are equal are not the same, and compare by their tensors
        self._calls[place] = call
        try:
            yield
        finally:
            del self._calls[place]
            self._aborted.discard(call.request_id)

    async def run(
        self, call: GenerateCall, engine_id: str, submit: Callable[[], AsyncGenerator[EngineOutput]]
    ) -> AsyncGenerator[EngineOutput]:
        """The outputs of one choice, once generation is not paused; only the end where the call has been aborted.

        Args:
            engine_id: What the engine calls it.
            submit: Submits it to the engine when its first output is asked for.
        """
        async with self._news:
            await self._news.wait_for(lambda: not self._paused or call.request_id in self._aborted)
        if call.request_id in self._aborted:
            yield EngineOutput((), "abort")
            return
        self._submitted[engine_id] += 1
        try:
            async with aclosing(submit()) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._submitted -= Counter([engine_id])

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End the requests of these ids, as clients gave them or as answers show them; others are ignored."""
        named = {*request_ids, *map(bare_id, request_ids)}
        found = [call for call in self._calls.values() if call.client_id in named]
        self._aborted |= {call.request_id for call in found}
        await self._notify()
        await self._abort([engine_id(call, choice.index) for call in found for choice in call.choices])

    def hold(self) -> None:
        """Hold new requests back; those that the engine has go on."""
        self._paused = True

    async def pause(self, mode: PauseMode = "wait") -> None:
        """Hold new requests back, wait until the engine has none.

        Args:
            mode: What becomes of those that it has: `wait` lets them end, `abort` ends them.
        """
        self.hold()
        if mode == "abort":
            await self._abort(list(self._submitted))
        while (stats := await self._engine.stats()).running or stats.waiting:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_AGAIN_S)  # the core is another process, which sets no event

    async def resume(self) -> None:
        """Let go on what was held back."""
        self._paused = False
        await self._notify()

    async def _abort(self, engine_ids: Sequence[str]) -> None:
        for each in engine_ids:
            await self._engine.abort(each)

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()


def engine_id(call: GenerateCall, index: int) -> str:
    """What the engine calls one choice of a call."""
    return f"{call.request_id}-{index}"


def bare_id(request_id: str) -> str:
    """The client's own id, out of one that an answer shows."""
    for prefix in PREFIXES:
        if request_id.startswith(prefix):
            return request_id.removeprefix(prefix)
    return request_id

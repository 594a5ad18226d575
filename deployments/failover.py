"""What the death of a replica means for a request: pure work is done again, a generation goes on elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from ray.exceptions import RayActorError

from deployments.calls import Event, GenerateCall, Started
from deployments.metrics import metrics
from renderer.errors import CacheMissError, EngineDeadError, EngineError, EngineStartingError

logger = logging.getLogger("ray.serve.greenroom")

T = TypeVar("T")
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
# A request that engines die under is more likely their cause than their victim.
MAX_DEATHS = 3


def is_lost(error: BaseException) -> bool:
    """Whether the replica, or the engine in it, is gone: the request may be served elsewhere."""
    return isinstance(error, (RayActorError, EngineDeadError))


async def retried(work: Callable[[], Awaitable[T]], attempts: int) -> T:
    """The result of pure work, tried again where a replica dies over it."""
    for attempt in range(1, attempts):
        try:
            return await work()
        except Exception as error:
            if not is_lost(error):
                raise
            metrics().retries.inc(tags={"tier": "render"})
            logger.warning("a replica was lost in attempt %d of %d; trying another", attempt, attempts)
    return await work()


class Progress:
    """What has arrived of a generation. The last event before a death may be lost, so only what arrived counts."""

    def __init__(self, call: GenerateCall) -> None:
        self._call = call
        self._output_ids = {choice.index: list(choice.prior_output_ids) for choice in call.choices}
        self._finished: set[int] = set()
        self._rank = call.rank
        self.started: Started | None = None

    def is_finished(self) -> bool:
        return len(self._finished) == len(self._output_ids)

    def note(self, event: Event) -> bool:
        """Count an event; return whether the client has yet to see it."""
        if isinstance(event, Started):
            first = self.started is None
            self.started = self.started or event
            return first
        self._output_ids[event.index].extend(event.token_ids)
        if event.finish_reason is not None:
            self._finished.add(event.index)
        return True

    def lost(self, error: BaseException) -> None:
        """Pass over the replica next time, where it is alive and its engine is not: it would be chosen again."""
        self._rank += isinstance(error, EngineDeadError)

    def passed_over(self) -> int:
        """Pass over the replica next time; return how many have been."""
        self._rank += 1
        return self._rank - self._call.rank

    def remaining(self) -> GenerateCall:
        """The call for another replica: the choices that are not finished, with the tokens that they have."""
        choices = tuple(
            replace(choice, prior_output_ids=tuple(self._output_ids[choice.index]))
            for choice in self._call.choices
            if choice.index not in self._finished
        )
        return replace(self._call, choices=choices, rank=self._rank)


async def continued(
    call: GenerateCall,
    open_stream: Callable[[GenerateCall], AsyncGenerator[Event]],
    patience_s: float,
    replicas: int = 1,
) -> AsyncGenerator[Event]:
    """The events of a generation, however many replicas it takes; no token comes twice.

    Args:
        open_stream: Starts the call on a replica that is alive.
        patience_s: How long to try without a token.
        replicas: How many to ask for an item that comes by its name alone.

    Raises:
        CacheMissError: None of them knows it.
        EngineDeadError: No replica was found in that time.
        EngineError: Too many died under this request.
    """
    progress = Progress(call)
    patience = _Patience(patience_s, call.request_id)
    while not progress.is_finished():
        try:
            async with aclosing(open_stream(progress.remaining())) as events:
                async for event in events:
                    patience.renew()
                    if progress.note(event):
                        yield event
            if not progress.is_finished():
                raise EngineDeadError("the stream ended before its last token")
        except CacheMissError:
            # What comes by its name alone is known to the replica that it was sent to, and that may be another.
            if progress.passed_over() >= replicas:
                raise
        except Exception as error:
            if not is_lost(error):
                raise
            if not progress.is_finished():
                progress.lost(error)
                _count(progress)
                await patience.wait(error)


def _count(progress: Progress) -> None:
    """One more attempt: a continuation where the client has seen a part of the answer."""
    if progress.started is None:
        metrics().retries.inc(tags={"tier": "engine"})
    else:
        metrics().continued_streams.inc()


class _Patience:
    """How long and how often to try again after a loss; progress renews it.

    How long a replica was silent before it was lost does not count: it may have had a long queue, or have hung.
    """

    def __init__(self, seconds: float, request_id: str) -> None:
        self._seconds = seconds
        self._request_id = request_id
        self.renew()

    def renew(self) -> None:
        self._lost_at: float | None = None
        self._pause, self._deaths = FIRST_PAUSE_S, 0

    async def wait(self, error: Exception) -> None:
        """Pause before the next attempt, longer each time.

        Raises:
            EngineDeadError, EngineError: There should be none.
        """
        self._deaths += not isinstance(error, EngineStartingError)
        if self._deaths >= MAX_DEATHS:
            raise EngineError(f"{self._deaths} engines died under this request") from error
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        if now - self._lost_at > self._seconds:
            raise EngineDeadError("no engine replica could go on with this request; try again") from error
        logger.warning("request %s: %s; going on elsewhere", self._request_id, type(error).__name__)
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)

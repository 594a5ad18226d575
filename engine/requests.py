"""The requests of an engine by their ids, so that an abort finds one wherever it is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class Aborted(Exception):
    """A request was aborted before whoever computes it could be told."""


class UnderWay:
    """One request, from its first step to its end. Of one event loop."""

    def __init__(self) -> None:
        self.is_aborted = False
        self._step: asyncio.Timeout | None = None

    def abort(self) -> None:
        if not self.is_aborted and self._step is not None:
            self._step.reschedule(asyncio.get_running_loop().time())
        self.is_aborted = True

    @asynccontextmanager
    async def step(self) -> AsyncIterator[None]:
        """Around a step of its way, which an abort ends, as a cancellation would.

        Raises:
            Aborted: The request is aborted, or was before.
        """
        if self.is_aborted:
            raise Aborted
        step = self._step = asyncio.timeout(None)
        try:
            async with step:
                yield
        except TimeoutError as error:
            if step.expired():
                raise Aborted from error
            raise
        finally:
            self._step = None


class Requests:
    """Those under way. Nothing is kept of one that has ended, nor of an abort that names none."""

    def __init__(self) -> None:
        self._by_id: dict[str, list[UnderWay]] = {}

    @contextmanager
    def under_way(self, request_id: str) -> Iterator[UnderWay]:
        request = UnderWay()
        same = self._by_id.setdefault(request_id, [])
        same.append(request)
        try:
            yield request
        finally:
            same.remove(request)
            if not same:
                self._by_id.pop(request_id, None)

    def abort(self, request_id: str) -> bool:
        """Whether there is such a request."""
        found = self._by_id.get(request_id, ())
        for request in found:
            request.abort()
        return bool(found)

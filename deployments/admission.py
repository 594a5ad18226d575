"""How much may be under way: exact limits on requests and on bytes of media, by lane, refused at once beyond them.

One `Admission` belongs to one router replica and is used from its event loop alone: nothing is awaited between looking
and counting, so no burst is refused that would fit, and none admitted that would not. Several routers each have their
share of a limit, and together no more than it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType

from renderer.errors import OverloadedError


class Lane(StrEnum):
    """Kinds of requests that do not take each other's place."""

    RENDER = "render"
    GENERATION = "generation"
    OVERFLOW = "overflow"  # render-only requests on engine replicas


@dataclass(frozen=True, slots=True)
class Share:
    """One router's part of what all have together.

    Attributes:
        place: This one's, from 0.
        of: How many there are.
    """

    place: int = 0
    of: int = 1


@dataclass(frozen=True, slots=True)
class Limit:
    """What may be under way at one time. For OVERFLOW the generation requests count too: render-only requests go to
    engine replicas only while both together are within its limit, and generation never asks what they have taken."""

    requests: int
    media_bytes: int

    def times(self, replicas: int) -> Limit:
        """The limit of so many replicas, where this is one replica's."""
        return Limit(self.requests * replicas, self.media_bytes * replicas)

    def share(self, share: Share) -> Limit:
        """A router's part: those of all routers add up to the limit. Where it is smaller than their number, each one
        has a place all the same: which router a client meets is chance."""
        return Limit(_part(self.requests, share), _part(self.media_bytes, share))


def _part(whole: int, share: Share) -> int:
    part = whole // share.of + (share.place < whole % share.of)
    return max(part, min(whole, 1))


@dataclass(frozen=True, slots=True)
class UnderWay:
    requests: int = 0
    media_bytes: int = 0

    def plus(self, requests: int, media_bytes: int) -> UnderWay:
        return UnderWay(self.requests + requests, self.media_bytes + media_bytes)


class Ticket:
    """One admitted request. Given back once: at the end of its `with`, or when it is dropped.

    A request whose answer outlives the function that admitted it hands its ticket on: see `pass_on`.
    """

    def __init__(self, admission: Admission, lane: Lane, media_bytes: int) -> None:
        self.lane = lane
        self._admission: Admission | None = admission
        self._media_bytes = media_bytes
        self._passed_on = False

    def resize(self, media_bytes: int) -> None:
        """Say what the request really carries, once that is known.

        Raises:
            OverloadedError: It is more than was admitted, and does not fit.
        """
        if self._admission is not None:
            self._admission._resize(self.lane, self._media_bytes, media_bytes)
            self._media_bytes = media_bytes

    def pass_on(self) -> Ticket:
        """Keep the ticket beyond the end of the `with` that it is in; the next `with` ends it."""
        self._passed_on = True
        return self

    def release(self) -> None:
        """Give it back; a second time is ignored."""
        if self._admission is not None:
            self._admission._leave(self.lane, self._media_bytes)
            self._admission = None

    def __enter__(self) -> Ticket:
        self._passed_on = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or not self._passed_on:
            self.release()

    def __del__(self) -> None:
        # An answer that nobody begins to send never reaches the end of its `with`.
        self.release()


class Admission:
    """Counts what is under way in each lane, and refuses what does not fit.

    Args:
        limits: By lane; a lane without one admits nothing.
        retry_after_s: What a refused client is told.
    """

    def __init__(self, limits: Mapping[Lane, Limit], retry_after_s: int = 1) -> None:
        self._limits = dict(limits)
        self._retry_after_s = retry_after_s
        self._under_way = dict.fromkeys(Lane, UnderWay())

    def admit(self, *lanes: Lane, media_bytes: int = 0) -> Ticket:
        """Take a place in the first of the lanes that has one.

        Raises:
            OverloadedError: None has; names the first lane's limit.
        """
        refusals = [self._refusal(lane, 1, media_bytes) for lane in lanes]
        for lane, refusal in zip(lanes, refusals, strict=True):
            if refusal is None:
                self._under_way[lane] = self._under_way[lane].plus(1, media_bytes)
                return Ticket(self, lane, media_bytes)
        raise OverloadedError(refusals[0] or "nothing is served here", self._retry_after_s)

    def under_way(self, lane: Lane) -> UnderWay:
        return self._under_way[lane]

    def set_limit(self, lane: Lane, limit: Limit) -> None:
        """Change a lane's limit; what is under way stays, whatever the new one is."""
        self._limits[lane] = limit

    def _refusal(self, lane: Lane, requests: int, media_bytes: int) -> str | None:
        """Why so much more does not fit into a lane; None where it does."""
        limit = self._limits.get(lane, Limit(0, 0))
        used = self._counted(lane)
        if used.requests + requests > limit.requests:
            return f"{lane}: {used.requests} requests are under way, {limit.requests} are allowed"
        alone = used.requests + requests <= 1
        # One request larger than the limit itself would otherwise never be served.
        if used.media_bytes + media_bytes > limit.media_bytes and media_bytes > 0 and not alone:
            return f"{lane}: {used.media_bytes} bytes of media are under way, {limit.media_bytes} are allowed"
        return None

    def _counted(self, lane: Lane) -> UnderWay:
        used = self._under_way[lane]
        if lane is not Lane.OVERFLOW:
            return used
        generation = self._under_way[Lane.GENERATION]
        return used.plus(generation.requests, generation.media_bytes)

    def _resize(self, lane: Lane, old: int, new: int) -> None:
        refusal = self._refusal(lane, 0, new - old)
        if refusal is not None and new > old:
            raise OverloadedError(refusal, self._retry_after_s)
        self._under_way[lane] = self._under_way[lane].plus(0, new - old)

    def _leave(self, lane: Lane, media_bytes: int) -> None:
        self._under_way[lane] = self._under_way[lane].plus(-1, -media_bytes)

"""Items of this replica's requests, processed by other replicas of the render tier."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from typing import Protocol

import numpy as np

from deployments.borrowing.rule import BorrowRule, Occupation, Place, choose_place
from deployments.config import HelpersConfig
from deployments.failover import is_lost
from deployments.metrics import metrics
from renderer.caches import ProcessedItem
from renderer.errors import RequestError
from renderer.media import MediaItem

logger = logging.getLogger("ray.serve.greenroom")

# Replicas that an item is tried on before it is processed here.
ATTEMPTS = 2
LocalWork = Callable[[], "Future[ProcessedItem]"]


class HelperTier(Protocol):
    """The replicas that can be asked."""

    def open(self) -> None:
        """Begin to look for them."""

    def replicas(self) -> int:
        """How many can be reached at once; 0 before the ways there are open and warm."""

    async def process(self, item: MediaItem) -> ProcessedItem:
        """One item, by any of them.

        Raises:
            RequestError: The item cannot be processed, by nobody.
            RayActorError: The replica was lost.
        """


class Helpers:
    """An item source that shares a replica's items with other replicas. Thread-safe.

    What is under way elsewhere is bounded by what the others take; the rest waits here, first come first served, and
    goes to whoever is free first. Nothing depends on the others: an item whose replicas are lost, or take too long,
    is processed here.

    Args:
        threads: That process items here.
        decoding: Sequences that an engine beside this renderer is decoding.
        copies: Whether items are to be kept, in a cache: tensors that came through shared memory would fill that.

    Attributes:
        counts: Items by what became of them: processed `here`, `borrowed`, `lost` with a replica (and tried again),
            `returned` (given back, and processed here).
    """

    def __init__(
        self,
        tier: HelperTier,
        rule: BorrowRule,
        threads: int,
        config: HelpersConfig,
        decoding: Callable[[], float] = lambda: 0.0,
        copies: bool = False,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._tier = tier
        self._rule = rule
        self._threads = threads
        self._config = config
        self._decoding = decoding
        self._copies = copies
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting: deque[_Errand] = deque()
        self._under_way: Counter[Place] = Counter()

    def open(self) -> None:
        """Begin to count, and to look for the others. Before, as warm-up must, everything is processed here."""
        self.counts.clear()
        self._tier.open()

    def compute(self, item: MediaItem, of: int, local: LocalWork) -> Future[ProcessedItem]:
        """See `renderer.items.ItemSource`."""
        errand = _Errand(item, of, local)
        errand.outcome.add_done_callback(lambda outcome: self._give_up(errand) if outcome.cancelled() else None)
        self._advance(errand)
        return errand.outcome

    def _advance(self, new: _Errand | None = None) -> None:
        """Take a new errand, and begin those that have a place now, in their order; small ones need not wait."""
        with self._lock:
            if new is not None:
                self._waiting.append(new)
            starting = []
            for errand in tuple(self._waiting):
                place = self._place(errand)
                if place is not Place.LATER:
                    self._waiting.remove(errand)
                    self._under_way[place] += 1
                    if place is Place.HERE:
                        self.counts["here"] += 1
                    errand.place = place
                    starting.append(errand)
        for errand in starting:
            self._begin(errand)

    def _place(self, errand: _Errand) -> Place:
        now = Occupation(
            decoding=self._decoding(),
            here=self._under_way[Place.HERE],
            threads=self._threads,
            away=self._under_way[Place.AWAY],
            room=self._config.items_per_replica * self._tier.replicas(),
        )
        return choose_place(self._rule, errand.item.size.width * errand.item.size.height, errand.of, now)

    def _begin(self, errand: _Errand) -> None:
        try:
            if errand.place is Place.AWAY:
                errand.work = errand.context.run(asyncio.run_coroutine_threadsafe, self._away(errand), self._loop)
            else:
                errand.work = errand.context.run(errand.local)
        except Exception as error:
            errand.work = Future()
            errand.work.set_exception(error)
        errand.work.add_done_callback(lambda work: self._finish(errand, work))
        if errand.outcome.cancelled():
            errand.work.cancel()

    def _finish(self, errand: _Errand, work: Future[ProcessedItem]) -> None:
        with self._lock:
            self._under_way[errand.place] -= 1
        errand.settle(work)
        self._advance()

    def _give_up(self, errand: _Errand) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            if errand in self._waiting:
                self._waiting.remove(errand)
        if errand.work is not None:
            errand.work.cancel()

    async def _away(self, errand: _Errand) -> ProcessedItem:
        for _ in range(ATTEMPTS):
            try:
                async with asyncio.timeout(self._config.patience_s):
                    item = await self._tier.process(errand.item)
            except RequestError:
                raise
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                # Ray cancels with a call those that it has made; this one may be for others too by now.
                self._note("lost")
            except Exception as error:
                logger.warning("a borrowed item came back: %s", type(error).__name__)
                if not is_lost(error):
                    break
                self._note("lost")
            else:
                self._note("borrowed")
                return _own(item, self._copies)
        return await self._returned(errand)

    async def _returned(self, errand: _Errand) -> ProcessedItem:
        with self._lock:
            self._under_way[errand.place] -= 1
            errand.place = Place.HERE
            self._under_way[errand.place] += 1
        self._note("returned")
        self._advance()
        return await asyncio.wrap_future(errand.local())

    def _note(self, outcome: str) -> None:
        self.counts[outcome] += 1
        metrics().borrowed_items.inc(tags={"outcome": outcome})


class _Errand:
    """One item on its way to whoever processes it."""

    def __init__(self, item: MediaItem, of: int, local: LocalWork) -> None:
        self.item = item
        self.of = of
        self.local = local
        self.place = Place.LATER
        self.work: Future[ProcessedItem] | None = None
        self.outcome: Future[ProcessedItem] = Future()
        self.context = copy_context()  # another request's end may be what begins it

    def settle(self, work: Future[ProcessedItem]) -> None:
        with suppress(InvalidStateError):  # nobody waits for it any more
            try:
                self.outcome.set_result(work.result())
            except CancelledError:
                self.outcome.cancel()
            except InvalidStateError:
                raise
            except BaseException as error:
                self.outcome.set_exception(error)


def _is_cancelled() -> bool:
    """Whether the running task is, rather than what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _own(item: ProcessedItem, copies: bool) -> ProcessedItem:
    """The item as one that was processed here: nobody can change its tensors."""
    tensors = {name: np.array(tensor) if copies else tensor for name, tensor in (item.tensors or {}).items()}
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return replace(item, tensors=tensors)

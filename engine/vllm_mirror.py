"""The sender cache beside a vLLM: a mirror of its receiver cache, which evicts by itself.

vLLM's receiver cache cannot be told what to drop. It is an LRU in bytes that sees a request's items in the order in
which requests are sent, and an LRU that sees the same references in the same order with no more room holds no more. So
the mirror is such an LRU with a smaller budget: what it claims, the receiver holds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from renderer.caches import CacheStats, Lease, ProcessedItem
from renderer.errors import CacheMissError
from renderer.prompt import ImageSize, PromptItem

# Room for what the receiver counts beside tensors.
BUDGET = 0.9


@dataclass(frozen=True, slots=True)
class SentItem:
    """One item of a request on its way to the receiver.

    Attributes:
        nbytes: As the receiver counts them, whether they cross or not.
        by_reference: Whether it crosses without its tensors.
    """

    cache_key: str
    size: ImageSize | None
    nbytes: int
    by_reference: bool


@dataclass(frozen=True, slots=True)
class _Mirrored:
    """`sure` is False where the receiver may or may not hold the item: its bytes count, it is not claimed."""

    size: ImageSize | None
    nbytes: int
    sure: bool


class VllmSenderCache:
    """What a vLLM's receiver cache holds, by key. Thread-safe; a `MediaCache` for the renderer.

    Planning a request, sending it and applying the plan are one step: nothing else is sent to the receiver in between.
    There are no pins, since the receiver has none: an item found at a look-up may be gone when its request is planned.

    Args:
        capacity_bytes: Of the receiver; 0 for one that holds nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._budget = int(BUDGET * capacity_bytes)
        self._items: OrderedDict[str, _Mirrored] = OrderedDict()
        self._stats = CacheStats()
        self._lock = threading.Lock()

    @property
    def stats(self) -> CacheStats:
        with self._lock:
            return replace(self._stats, entries=len(self._items))

    def keys(self) -> tuple[str, ...]:
        """Keys claimed, least recently used first."""
        with self._lock:
            return tuple(key for key, item in self._items.items() if item.sure)

    def lease(self) -> None:
        """None: nothing can be pinned."""

    def look_up(self, key: str, lease: Lease | None = None) -> ProcessedItem | None:
        """The item without tensors where the receiver holds it. Changes nothing."""
        with self._lock:
            item = self._items.get(key)
            return ProcessedItem(item.size, None, item.nbytes) if item is not None and item.sure else None

    def store(self, key: str, item: ProcessedItem) -> None:
        """Nothing: an item enters when its request is sent."""

    def plan(self, items: Sequence[PromptItem]) -> tuple[SentItem, ...]:
        """How each item of a request would cross now. Changes nothing that the receiver depends on.

        Raises:
            CacheMissError: An item has no tensors, and the receiver is not sure to hold it when its turn comes.
        """
        with self._lock:
            fits = self._fits(items)
            planned = []
            earlier: set[str] = set()
            for item in items:
                planned.append(self._planned(item, fits, item.cache_key in earlier))
                earlier.add(item.cache_key)
            missing = [item for item, sent in zip(items, planned, strict=True) if _is_missing(item, sent)]
            if missing and not fits:
                self._doubt(earlier)  # or it would be found, and refused, for ever
        if missing:
            raise CacheMissError(f"item {missing[0].mm_hash} came without data and is not held")
        return tuple(planned)

    def apply(self, items: Sequence[SentItem], sure: bool = True) -> None:
        """Enter a request's items as the receiver does: touch all, then take one after the other.

        Args:
            sure: False where it is not known whether the request arrived.
        """
        with self._lock:
            for item in items:
                if item.cache_key in self._items:
                    self._items.move_to_end(item.cache_key)
            for item in items:
                self._take(item, sure)

    def doubt(self, keys: Iterable[str]) -> None:
        """Claim these no longer: the receiver turned out not to hold one of them."""
        with self._lock:
            self._doubt(keys)

    def clear_cache(self) -> None:
        """Forget every item and every statistic. The receiver may well hold more than is claimed."""
        with self._lock:
            self._items.clear()
            self._stats = CacheStats()

    def reset(self) -> None:
        """The receiver is empty: forget what it held. Counters stay."""
        with self._lock:
            self._forget_all()

    def disable(self) -> None:
        """The receiver holds nothing that could be claimed: everything crosses with its tensors."""
        with self._lock:
            self._forget_all()
            self._budget = 0

    def _planned(self, item: PromptItem, fits: bool, is_repeated: bool) -> SentItem:
        held = self._items.get(item.cache_key)
        by_reference = fits and (is_repeated or (held is not None and held.sure))
        return SentItem(item.cache_key, item.size, self._nbytes(item), by_reference)

    def _fits(self, items: Sequence[PromptItem]) -> bool:
        """Whether the request's own items cannot push one another out."""
        return sum({item.cache_key: self._nbytes(item) for item in items}.values()) <= self._budget

    def _nbytes(self, item: PromptItem) -> int:
        held = self._items.get(item.cache_key)
        return item.nbytes if held is None else held.nbytes

    def _take(self, item: SentItem, sure: bool) -> None:
        self._discard(item.cache_key)
        self._count(item)
        if item.nbytes > self._budget:
            self._stats = replace(self._stats, uncached=self._stats.uncached + 1)
            self._forget_all()  # a receiver with a little more room keeps it, and drops others for it
            return
        self._items[item.cache_key] = _Mirrored(item.size, item.nbytes, sure)
        self._stats = replace(self._stats, bytes=self._stats.bytes + item.nbytes)
        while self._stats.bytes > self._budget:
            self._discard(next(iter(self._items)))
            self._stats = replace(self._stats, evictions=self._stats.evictions + 1)

    def _count(self, item: SentItem) -> None:
        hits, misses = self._stats.hits + item.by_reference, self._stats.misses + (not item.by_reference)
        self._stats = replace(self._stats, hits=hits, misses=misses)

    def _discard(self, key: str) -> None:
        item = self._items.pop(key, None)
        if item is not None:
            self._stats = replace(self._stats, bytes=self._stats.bytes - item.nbytes)

    def _forget_all(self) -> None:
        self._items.clear()
        self._stats = replace(self._stats, bytes=0)

    def _doubt(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self._items:
                self._items[key] = replace(self._items[key], sure=False)


def _is_missing(item: PromptItem, sent: SentItem) -> bool:
    return item.tensors is None and not sent.by_reference

"""The two caches of a renderer: the sender cache (engine path) and the processor-only cache (render-only path).

The sender cache decides what the engine's receiver cache holds. Every submission names, in order, the keys that the
receiver must drop and the items it lacks; the receiver obeys, so the two cannot drift.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

from renderer.errors import CacheMissError
from renderer.prompt import ImageSize, PromptItem, Tensors


@dataclass(frozen=True, slots=True)
class ProcessedItem:
    """One item out of a processor: its size, its tensors (None where the engine holds them), and their bytes.

    `size` is None for an item that arrived processed: its placeholder range came with it.
    """

    size: ImageSize | None
    tensors: Tensors | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Levels (`entries`, `bytes`, `pinned`) and counters since start.

    `uncached` counts items that passed because pins or their own size left no room.
    """

    entries: int = 0
    bytes: int = 0
    pinned: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    uncached: int = 0


class MediaCache(Protocol):
    """What a processor asks of its cache."""

    @property
    def stats(self) -> CacheStats: ...

    def lease(self) -> Lease | None: ...

    def look_up(self, key: str, lease: Lease | None) -> ProcessedItem | None: ...

    def store(self, key: str, item: ProcessedItem) -> None: ...

    def clear_cache(self) -> None: ...


class ProcessorCache:
    """Processed items by key, least recently used first out, bounded in bytes. Thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._items: OrderedDict[str, ProcessedItem] = OrderedDict()
        self._stats = CacheStats()
        self._lock = threading.Lock()

    @property
    def stats(self) -> CacheStats:
        with self._lock:
            return replace(self._stats, entries=len(self._items))

    def lease(self) -> Lease | None:
        """None: its items are handed out with their tensors, so nothing has to stay."""
        return None

    def look_up(self, key: str, lease: Lease | None = None) -> ProcessedItem | None:
        with self._lock:
            item = self._items.get(key)
            if item is None:
                self._stats = replace(self._stats, misses=self._stats.misses + 1)
                return None
            self._items.move_to_end(key)
            self._stats = replace(self._stats, hits=self._stats.hits + 1)
            return item

    def store(self, key: str, item: ProcessedItem) -> None:
        with self._lock:
            if item.nbytes > self._capacity:
                self._stats = replace(self._stats, uncached=self._stats.uncached + 1)
                return
            self._discard(key)
            self._items[key] = item
            self._stats = replace(self._stats, bytes=self._stats.bytes + item.nbytes)
            while self._stats.bytes > self._capacity:
                self._discard(next(iter(self._items)))
                self._stats = replace(self._stats, evictions=self._stats.evictions + 1)

    def clear_cache(self) -> None:
        """Forget every item and every statistic."""
        with self._lock:
            self._items.clear()
            self._stats = CacheStats()

    def _discard(self, key: str) -> None:
        item = self._items.pop(key, None)
        if item is not None:
            self._stats = replace(self._stats, bytes=self._stats.bytes - item.nbytes)


@dataclass(frozen=True, slots=True)
class SubmittedItem:
    """One item of a submission.

    Attributes:
        tensors: None where the receiver holds the item, or has it from an earlier place in the same submission.
        keep: Whether the receiver stores it; False for an item that passes uncached.
    """

    cache_key: str
    tensors: Tensors | None
    keep: bool = True


@dataclass(frozen=True, slots=True)
class Submission:
    """What the receiver does for one request: drop these keys first, then take the items in order."""

    drop: tuple[str, ...]
    items: tuple[SubmittedItem, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    size: ImageSize | None
    nbytes: int


class SenderCache:
    """What the receiver cache holds, by key, without tensors; bounded in bytes. Thread-safe.

    An item is pinned by a lease from its look-up until the lease closes, and a pinned item is never dropped. Where
    pins leave no room an item passes uncached. Look-ups change nothing: order, entries and counters move at `commit`
    alone, so a request that ends before its commit leaves no trace.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._pins: Counter[str] = Counter()
        self._doomed: set[str] = set()
        self._pending_drops: list[str] = []
        self._stats = CacheStats()
        self._lock = threading.Lock()

    @property
    def stats(self) -> CacheStats:
        with self._lock:
            pinned = sum(key in self._pins for key in self._held)
            return replace(self._stats, entries=len(self._held), pinned=pinned)

    def keys(self) -> tuple[str, ...]:
        """Keys held, least recently used first."""
        with self._lock:
            return tuple(self._held)

    def lease(self) -> Lease:
        return Lease(self)

    def look_up(self, key: str, lease: Lease | None) -> ProcessedItem | None:
        """Pin a key for the lease, held or not; return the item without tensors if the receiver holds it.

        Raises:
            ValueError: Without an open lease: an unpinned look-up could be dropped before it is submitted.
        """
        if lease is None:
            raise ValueError("a look-up in the sender cache needs a lease")
        with self._lock:
            if lease.closed:
                raise ValueError("the lease is closed: what it pins now would stay pinned")
            lease.keys.append(key)
            self._pins[key] += 1
            held = self._held.get(key)
            return None if held is None else ProcessedItem(held.size, None, held.nbytes)

    def store(self, key: str, item: ProcessedItem) -> None:
        """Nothing: an item enters when its request is submitted, in the order of submissions."""

    def commit(self, items: Sequence[PromptItem]) -> Submission:
        """Enter a request's items, in prompt order, and tell what the receiver must do.

        The caller hands the submission to the receiver before anybody else commits: one lock around both.

        Raises:
            CacheMissError: An item has no tensors and is not held; nothing is changed. It was looked up before the
                engine restarted (render again), or never held (the caller's claim is wrong).
        """
        with self._lock:
            self._check_present(items)
            drop, self._pending_drops = self._pending_drops, []
            own = {item.cache_key for item in items}
            sent: set[str] = set()
            submitted = tuple(self._enter(item, own, sent, drop) for item in items)
            return Submission(tuple(drop), submitted)

    def clear_cache(self) -> None:
        """Forget everything and every statistic; the receiver drops it with the next submission, pinned items later."""
        with self._lock:
            self._doomed = {key for key in self._held if key in self._pins}
            self._pending_drops += [key for key in self._held if key not in self._doomed]
            for key in self._pending_drops:
                self._held.pop(key, None)
            self._stats = CacheStats(bytes=sum(held.nbytes for held in self._held.values()))

    def reset(self) -> None:
        """The receiver is new and empty: forget what it held. Counters and pins stay."""
        with self._lock:
            self._held.clear()
            self._doomed.clear()
            self._pending_drops.clear()
            self._stats = replace(self._stats, bytes=0)

    def release(self, lease: Lease) -> None:
        """Unpin what a lease holds, and close it."""
        with self._lock:
            lease.closed = True
            keys, lease.keys = lease.keys, []
            for key in keys:
                self._pins[key] -= 1
                if self._pins[key] > 0:
                    continue
                del self._pins[key]
                if key in self._doomed:
                    self._doomed.discard(key)
                    self._forget(key)
                    self._pending_drops.append(key)

    def _check_present(self, items: Sequence[PromptItem]) -> None:
        given = set(self._held)
        for item in items:
            if item.tensors is None and item.cache_key not in given:
                raise CacheMissError(f"item {item.mm_hash} came without data and is not held")
            given.add(item.cache_key)

    def _enter(self, item: PromptItem, own: set[str], sent: set[str], drop: list[str]) -> SubmittedItem:
        key = item.cache_key
        if key in self._held or key in sent:
            self._stats = replace(self._stats, hits=self._stats.hits + 1)
            if key in self._held:
                self._held.move_to_end(key)
            return SubmittedItem(key, None)
        sent.add(key)
        self._stats = replace(self._stats, misses=self._stats.misses + 1)
        if not self._make_room(item.nbytes, own, drop):
            self._stats = replace(self._stats, uncached=self._stats.uncached + 1)
            return SubmittedItem(key, item.tensors, keep=False)
        self._held[key] = _Held(item.size, item.nbytes)
        self._stats = replace(self._stats, bytes=self._stats.bytes + item.nbytes)
        return SubmittedItem(key, item.tensors)

    def _make_room(self, nbytes: int, own: set[str], drop: list[str]) -> bool:
        """Drop items, oldest first, neither pinned nor the request's own, until `nbytes` fit; none if they cannot."""
        excess = self._stats.bytes + nbytes - self._capacity
        victims = []
        for key, held in self._held.items():
            if excess <= 0:
                break
            if key not in self._pins and key not in own:
                victims.append(key)
                excess -= held.nbytes
        if excess > 0:
            return False
        for key in victims:
            self._forget(key)
        drop += victims
        self._stats = replace(self._stats, evictions=self._stats.evictions + len(victims))
        return True

    def _forget(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._stats = replace(self._stats, bytes=self._stats.bytes - held.nbytes)


class Lease:
    """The pins of one request on the sender cache, from look-up to the request's end. Closing twice is harmless."""

    def __init__(self, cache: SenderCache) -> None:
        self.cache = cache
        self.keys: list[str] = []
        self.closed = False

    def close(self) -> None:
        self.cache.release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

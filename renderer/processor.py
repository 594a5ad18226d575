"""The multimodal processor: media items to tensors, each once, through one cache, by whoever computes them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from renderer import hashing
from renderer.caches import Lease, MediaCache, ProcessedItem
from renderer.conversation import ImagePart
from renderer.errors import CacheMissError, MediaError
from renderer.family import Family
from renderer.image import ImageLimits, decode
from renderer.items import ItemSource, LocalItems
from renderer.media import MediaItem, bytes_of, check_uuid, identify
from renderer.names import Names
from renderer.prompt import Tensors, tensor_bytes
from renderer.threads import WarmPool, abandoned

_MAX_NAMES = 65536
# How often a request that waits for its items looks whether anybody still waits for it.
_LOOK_S = 0.1


class MultiModalProcessor:
    """Identifies and processes the media of requests. Thread-safe.

    A renderer holds two, which differ in their cache alone. Equal items under way at the same time are processed
    once; nobody's cancellation ends work that another waits for.

    Attributes:
        cache: The sender cache, a processor-only cache, or None.
    """

    def __init__(
        self,
        model: str,
        cache: MediaCache | None,
        pool: WarmPool,
        limits: ImageLimits,
        max_uuid_length: int,
        source: ItemSource | None = None,
        first: bool = False,
    ) -> None:
        """
        Args:
            source: Computes what the cache lacks; None: the pool.
            first: Whether its items go before those of others in the pool.
        """
        self.cache = cache
        self._source = source or LocalItems()
        self._model = model
        self._pool = pool
        self._first = first
        self._limits = limits
        self._max_uuid_length = max_uuid_length
        self._names = Names(_MAX_NAMES)
        self._under_way: dict[tuple[str, bool], _Job] = {}
        self._lock = threading.Lock()

    def lease(self) -> Lease | None:
        """A new lease on the cache, None where it has no pins."""
        return None if self.cache is None else self.cache.lease()

    def identify(
        self, parts: Sequence[ImagePart], cache_salt: str | None, options: Mapping[str, Any]
    ) -> tuple[MediaItem, ...]:
        """Headers and hashes of a request's images; no pixel is decoded, and no uuid is remembered.

        Raises:
            MediaError: An image is malformed or beyond the limits.
            CacheMissError: A uuid came without data, and this tenant has not sent its data here.
        """
        named: dict[str, MediaItem] = {}
        return tuple(self._identify(part, index, cache_salt, options, named) for index, part in enumerate(parts))

    def apply(self, items: Sequence[MediaItem], family: Family, lease: Lease | None) -> tuple[ProcessedItem, ...]:
        """Process a request's items, in parallel and each distinct one once, or take them from the cache. Once all are
        there their uuids are remembered.

        Raises:
            MediaError: An image is corrupt, or the model cannot take it.
            CacheMissError: An item came without data, and the cache does not hold it.
        """
        if not items:
            return ()
        found: dict[str, ProcessedItem | _Job] = {}
        distinct = len({item.cache_key for item in items})
        try:
            for item in items:
                if item.cache_key not in found:
                    found[item.cache_key] = self._find(item, family, lease, distinct)
            processed = tuple(_awaited(found[item.cache_key], item) for item in items)
        finally:
            self._leave([job for job in found.values() if isinstance(job, _Job)])
        self.remember(items)
        return processed

    def remember(self, items: Sequence[MediaItem]) -> None:
        """Let the uuids of a request that has not failed stand for what came with them."""
        for item in items:
            if item.name is not None and item.data is not None:
                self._names.remember(item.name, item.cache_key, item.size)

    def submit(self, item: MediaItem, family: Family) -> Future[ProcessedItem]:
        """Begin what `apply` does for one item, with a cache that has no pins and in this process' own threads, and
        return at once.

        It joins no work that `apply` has under way: that may be on another replica, and wait for this very call.
        Cancelling the future ends the wait for the item, and the work on it where nobody else waits.
        """
        found, mine = self._find(item, family, None, 1, here=True), Future[ProcessedItem]()
        if isinstance(found, ProcessedItem):
            mine.set_result(found)
            return mine
        found.item.add_done_callback(lambda done: _hand_on(done, mine))
        mine.add_done_callback(lambda _: self._leave([found]))
        return mine

    def process(self, item: MediaItem, family: Family) -> ProcessedItem:
        """Decode and process one item in this thread, beside any cache."""
        if item.data is None or item.header is None:
            raise _missing(item.index)
        pixels = decode(item.data, item.header, item.index)
        try:
            tensors = family.tensors(pixels)
        except ValueError as error:
            raise MediaError(str(error), item.index) from error
        _freeze(tensors)
        return ProcessedItem(item.size, tensors, tensor_bytes(tensors))

    def waiting(self, item: MediaItem) -> int:
        """How many requests wait for the work on an item."""
        with self._lock:
            return sum(job.waiters for (key, _), job in self._under_way.items() if key == item.cache_key)

    def clear_names(self) -> None:
        """Forget which uuid stands for which content."""
        self._names.clear()

    def _identify(
        self,
        part: ImagePart,
        index: int,
        salt: str | None,
        options: Mapping[str, Any],
        named: dict[str, MediaItem],
    ) -> MediaItem:
        """
        Args:
            named: The request's own items so far, by the keys of their uuids.
        """
        check_uuid(part.uuid, index, self._max_uuid_length)
        data = bytes_of(part, index)
        name = None if part.uuid is None else hashing.uuid_key(salt, part.uuid, options)
        if data is not None:
            item = identify(part, index, data, model=self._model, options=options, limits=self._limits)
            if name is not None:
                item = named[name] = dataclasses.replace(item, name=name)
            return item
        if name is None or part.uuid is None:
            raise _missing(index)
        earlier = named.get(name)
        known = self._names.recall(name) if earlier is None else (earlier.cache_key, earlier.size)
        if known is None:
            raise _missing(index)
        cache_key, size = known
        return MediaItem(index, None, None, size, hashing.uuid_hash(self._model, part.uuid, options), cache_key)

    def _find(
        self, item: MediaItem, family: Family, lease: Lease | None, of: int, here: bool = False
    ) -> ProcessedItem | _Job:
        """The cached item, or the work on it, which this request waits for from now on."""
        with self._lock:
            held = None if self.cache is None else self.cache.look_up(item.cache_key, lease)
            if held is not None:
                return held
            job = self._under_way.get((item.cache_key, here))
            if job is not None:
                job.waiters += 1
                return job
            if item.data is None:
                raise _missing(item.index)
            job = self._under_way[item.cache_key, here] = _Job(item.cache_key, here)
        self._begin(job, item, family, of)
        return job

    def _begin(self, job: _Job, item: MediaItem, family: Family, of: int) -> None:
        try:
            local = partial(self._pool.submit, self.process, item, family, first=self._first)
            job.work = local() if job.here else self._source.compute(item, of, local)
        except BaseException as error:
            self._end(job, error)
            raise
        job.work.add_done_callback(lambda work: self._take(job, work))

    def _take(self, job: _Job, work: Future[ProcessedItem]) -> None:
        """Keep what was computed, before it ceases to be under way."""
        try:
            item = work.result()
            if self.cache is not None:
                self.cache.store(job.key, item)
        except BaseException as error:
            self._end(job, error)
        else:
            self._end(job, item)
        finally:
            job.work = None  # It refers to the job: the tensors would stay until the garbage is collected.

    def _end(self, job: _Job, outcome: ProcessedItem | BaseException) -> None:
        with self._lock:
            self._forget(job)
        if isinstance(outcome, BaseException):
            job.item.set_exception(outcome)
        else:
            job.item.set_result(outcome)

    def _leave(self, jobs: Sequence[_Job]) -> None:
        """Wait for these no longer; end those that nobody waits for."""
        with self._lock:
            for job in jobs:
                job.waiters -= 1
            left = [job for job in jobs if job.waiters == 0 and not job.item.done()]
            for job in left:
                self._forget(job)
        for job in left:
            work = job.work
            if work is not None:
                work.cancel()

    def _forget(self, job: _Job) -> None:
        if self._under_way.get((job.key, job.here)) is job:
            del self._under_way[job.key, job.here]


class _Job:
    """The work on one item, for all requests that wait for it.

    `item` is there once the cache has it; `work`, which may be cancelled, is what computes it; `here` says that it is
    this process' own threads.
    """

    def __init__(self, key: str, here: bool) -> None:
        self.key = key
        self.here = here
        self.waiters = 1
        self.item: Future[ProcessedItem] = Future()
        self.work: Future[ProcessedItem] | None = None


def _awaited(found: ProcessedItem | _Job, item: MediaItem) -> ProcessedItem:
    if isinstance(found, ProcessedItem):
        return found
    while True:
        try:
            return found.item.result(_LOOK_S)
        except MediaError as error:  # Work that several wait for names each one's own place.
            raise type(error)(error.message, item.index, error.param) from error
        except TimeoutError as error:
            if found.item.done():
                if found.item.exception() is error:
                    raise
                continue  # it came while the wait ended
            if abandoned():
                raise CancelledError from None


def _hand_on(done: Future[ProcessedItem], mine: Future[ProcessedItem]) -> None:
    with suppress(InvalidStateError):  # it was cancelled
        error = done.exception()
        if error is None:
            mine.set_result(done.result())
        else:
            mine.set_exception(error)


def _missing(index: int) -> CacheMissError:
    return CacheMissError(f"image {index} came without data, and nothing is held under its uuid", "image_url")


def _freeze(tensors: Tensors) -> None:
    """Cached tensors are shared by every request that holds them."""
    for tensor in tensors.values():
        np.asarray(tensor).flags.writeable = False

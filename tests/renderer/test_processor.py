"""Items are processed once each, through one cache, whoever asks and whoever leaves."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from renderer.caches import CacheStats, MediaCache, ProcessedItem, ProcessorCache, SenderCache
from renderer.conversation import ImagePart
from renderer.errors import CacheMissError, MediaError, RequestError
from renderer.media import MediaItem
from renderer.processor import MultiModalProcessor, _awaited, _Job
from renderer.prompt import PlaceholderRange, PromptItem, Tensors
from renderer.renderer import Renderer
from renderer.threads import WarmPool
from tests.renderer.builders import LIMITS, image_part, photo
from tests.stack.helpers import wait_until

DEADLINE_S = 20


class Watched:
    """A family that counts what it is asked for, and can be held in the middle of it."""

    def __init__(self, family: Any) -> None:
        self._family = family
        self.processed: Counter[bytes] = Counter()
        self.threads: set[str] = set()
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def tensors(self, pixels: Any) -> Tensors:
        self.processed[pixels.tobytes()] += 1
        self.threads.add(threading.current_thread().name)
        self.entered.release()
        assert self.go.wait(DEADLINE_S)
        tensors: Tensors = self._family.tensors(pixels)
        return tensors


@pytest.fixture
def pool() -> Iterator[WarmPool]:
    pool = WarmPool(3, "media")
    yield pool
    pool.close()


@pytest.fixture
def family(shared: Renderer) -> Watched:
    return Watched(shared.family)


def processor(pool: WarmPool, cache: MediaCache | None = None) -> MultiModalProcessor:
    return MultiModalProcessor("model", cache, pool, LIMITS, max_uuid_length=64)


def identified(
    own: MultiModalProcessor, *parts: ImagePart, salt: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[MediaItem, ...]:
    return own.identify(parts, salt, options or {})


def values(own: MultiModalProcessor, items: Sequence[MediaItem], family: Watched) -> list[bytes]:
    """The tensors of every item, as bytes to compare."""
    results = own.apply(items, family, None)
    return [b"".join(t.tobytes() for t in (result.tensors or {}).values()) for result in results]


def test_every_item_gets_its_own_tensors_in_order(pool: WarmPool, family: Watched) -> None:
    own = processor(pool)
    alone = [values(own, identified(own, image_part(seed)), family)[0] for seed in range(5)]
    assert len(set(alone)) == 5
    assert values(own, identified(own, *map(image_part, range(5))), family) == alone
    assert values(own, identified(own, *map(image_part, (3, 1, 3))), family) == [alone[3], alone[1], alone[3]]


def test_equal_items_of_a_request_are_processed_once(pool: WarmPool, family: Watched) -> None:
    own = processor(pool)
    values(own, identified(own, image_part(), image_part(1), image_part(), image_part()), family)
    assert sorted(family.processed.values()) == [1, 1]


@pytest.mark.parametrize("cached", [True, False])
def test_equal_items_under_way_at_the_same_time_are_processed_once(
    pool: WarmPool, family: Watched, cached: bool
) -> None:
    own = processor(pool, ProcessorCache(10**8) if cached else None)
    family.go.clear()
    with ThreadPoolExecutor(6) as clients:
        first = clients.submit(values, own, identified(own, image_part()), family)
        assert family.entered.acquire(timeout=DEADLINE_S)
        others = [clients.submit(values, own, identified(own, image_part()), family) for _ in range(5)]
        family.go.set()
        results = [client.result(DEADLINE_S) for client in (first, *others)]
    assert all(result == results[0] for result in results)
    if cached:
        assert list(family.processed.values()) == [1]


def test_items_of_a_request_are_processed_at_the_same_time(pool: WarmPool, family: Watched) -> None:
    own = processor(pool)
    family.go.clear()
    with ThreadPoolExecutor(1) as client:
        result = client.submit(values, own, identified(own, *map(image_part, range(3))), family)
        for _ in range(3):
            assert family.entered.acquire(timeout=DEADLINE_S)
        family.go.set()
        assert len(result.result(DEADLINE_S)) == 3


def test_a_cached_item_is_not_processed_again(pool: WarmPool, family: Watched) -> None:
    cache = ProcessorCache(10**8)
    own = processor(pool, cache)
    first, second = (values(own, identified(own, image_part()), family) for _ in range(2))
    assert first == second
    assert list(family.processed.values()) == [1]
    assert (cache.stats.hits, cache.stats.misses, cache.stats.entries) == (1, 1, 1)


def test_an_items_memory_is_free_once_nobody_holds_it(pool: WarmPool, family: Watched) -> None:
    own, gone = processor(pool), threading.Event()
    gc.disable()
    try:
        (result,) = own.apply(identified(own, image_part()), family, None)
        assert result.tensors is not None
        weakref.finalize(result.tensors["pixel_values"], gone.set)
        del result
        assert gone.wait(DEADLINE_S)
    finally:
        gc.enable()


def test_an_item_that_the_engine_holds_comes_without_tensors(pool: WarmPool, family: Watched) -> None:
    cache = SenderCache(10**8)
    own = processor(pool, cache)
    items = identified(own, image_part())
    with cache.lease() as lease:
        fresh = own.apply(items, family, lease)[0]
        assert fresh.tensors is not None
        assert lease.keys == [items[0].cache_key]
        cache.commit([PromptItem("hash", items[0].cache_key, PlaceholderRange(0, 1), fresh.tensors, fresh.size)])
    with cache.lease() as lease:
        assert own.apply(items, family, lease)[0].tensors is None
    assert list(family.processed.values()) == [1]


def test_the_same_picture_under_other_options_is_another_item(pool: WarmPool, family: Watched) -> None:
    own = processor(pool, ProcessorCache(10**8))
    plain = identified(own, image_part())
    smaller = identified(own, image_part(), options={"max_pixels": 12544})
    assert plain[0].cache_key != smaller[0].cache_key
    assert plain[0].mm_hash != smaller[0].mm_hash


def test_a_uuid_stands_for_what_this_tenant_last_sent_under_it(pool: WarmPool, family: Watched) -> None:
    own = processor(pool, ProcessorCache(10**8))
    named = identified(own, image_part(1, uuid="mine"))
    sent = values(own, named, family)
    again = identified(own, ImagePart(uuid="mine"))
    assert values(own, again, family) == sent
    assert (again[0].mm_hash, again[0].cache_key, again[0].size) == ("mine", named[0].cache_key, named[0].size)
    renamed = values(own, identified(own, image_part(2, uuid="mine")), family)
    assert renamed != sent
    assert values(own, identified(own, ImagePart(uuid="mine")), family) == renamed


def test_a_request_that_fails_leaves_a_uuid_what_it_stood_for(pool: WarmPool, family: Watched) -> None:
    own = processor(pool, ProcessorCache(10**8))
    sent = values(own, identified(own, image_part(1, uuid="mine")), family)
    broken = ImagePart(data=photo(seed=2)[:-400], uuid="mine")
    for others in ((broken,), (image_part(2, uuid="mine"), ImagePart(data=photo(seed=3)[:-400]))):
        with pytest.raises(MediaError):
            values(own, identified(own, *others), family)
        assert values(own, identified(own, ImagePart(uuid="mine")), family) == sent
    with pytest.raises(MediaError):
        identified(own, image_part(2, uuid="mine"), ImagePart(data=b"no image"))
    assert values(own, identified(own, ImagePart(uuid="mine")), family) == sent


def test_a_uuid_stands_for_what_came_with_it_earlier_in_the_same_request(pool: WarmPool, family: Watched) -> None:
    own = processor(pool, ProcessorCache(10**8))
    values(own, identified(own, image_part(1, uuid="mine")), family)
    parts = (image_part(2, uuid="mine"), ImagePart(uuid="mine"), image_part(3, uuid="mine"), ImagePart(uuid="mine"))
    first, second, third, fourth = values(own, identified(own, *parts), family)
    assert first == second != third == fourth
    assert values(own, identified(own, ImagePart(uuid="mine")), family) == [third]


@pytest.mark.parametrize("other", [{"salt": "b"}, {"salt": None}, {"salt": "a", "options": {"max_pixels": 12544}}])
def test_a_uuid_means_nothing_to_another_tenant_or_under_other_options(
    pool: WarmPool, family: Watched, other: dict[str, Any]
) -> None:
    own = processor(pool, ProcessorCache(10**8))
    values(own, identified(own, image_part(uuid="mine"), salt="a"), family)
    with pytest.raises(CacheMissError, match="image 0 came without data"):
        identified(own, ImagePart(uuid="mine"), **other)


def test_a_uuid_never_answers_for_content(pool: WarmPool, family: Watched) -> None:
    own = processor(pool, ProcessorCache(10**8))
    victim = identified(own, image_part(1))[0]
    values(own, identified(own, image_part(2, uuid=victim.mm_hash)), family)
    plain = processor(pool)
    expected = values(plain, identified(plain, image_part(1)), family)
    assert values(own, identified(own, image_part(1)), family) == expected


def test_a_uuid_whose_content_is_gone_is_a_cache_miss(pool: WarmPool, family: Watched) -> None:
    cache = ProcessorCache(10**8)
    own = processor(pool, cache)
    values(own, identified(own, image_part(uuid="mine")), family)
    cache.clear_cache()
    with pytest.raises(CacheMissError, match="image 1 came without data"):
        values(own, identified(own, image_part(1), ImagePart(uuid="mine")), family)


def test_a_uuid_that_is_too_long_is_refused(pool: WarmPool) -> None:
    with pytest.raises(RequestError, match="65 characters"):
        identified(processor(pool), image_part(uuid="x" * 65))


def test_a_broken_image_fails_everybody_who_waits_for_it_each_by_its_own_place(pool: WarmPool, family: Watched) -> None:
    own, go = processor(pool), threading.Event()
    broken = ImagePart(data=photo()[:-400])

    blocked = [pool.submit(go.wait, DEADLINE_S) for _ in range(pool.size)]
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(own.apply, identified(own, broken), family, None)
        second = clients.submit(own.apply, identified(own, image_part(1), broken), family, None)
        go.set()
        for client, place in ((first, 0), (second, 1)):
            error = client.exception(DEADLINE_S)
            assert isinstance(error, MediaError)
            assert error.index == place
    assert all(job.result(DEADLINE_S) for job in blocked)


def test_a_failure_leaves_nothing_under_way(pool: WarmPool, family: Watched) -> None:
    cache = ProcessorCache(10**8)
    own = processor(pool, cache)
    items = identified(own, ImagePart(data=photo()[:-400]))
    for _ in range(2):
        with pytest.raises(MediaError):
            own.apply(items, family, None)
    assert cache.stats == CacheStats(misses=2)


def test_cached_tensors_cannot_be_changed_by_who_gets_them(pool: WarmPool, family: Watched) -> None:
    own = processor(pool)
    tensors = own.apply(identified(own, image_part()), family, None)[0].tensors
    assert tensors is not None
    for tensor in tensors.values():
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0


def test_processing_happens_in_the_pools_threads_alone(pool: WarmPool, family: Watched) -> None:
    own = processor(pool)
    values(own, identified(own, *map(image_part, range(4))), family)
    assert all(name.startswith("media") for name in family.threads)


def test_forgotten_names_are_unknown(pool: WarmPool, family: Watched) -> None:
    own = processor(pool, ProcessorCache(10**8))
    values(own, identified(own, image_part(uuid="mine")), family)
    own.clear_names()
    with pytest.raises(CacheMissError):
        identified(own, ImagePart(uuid="mine"))


class Elsewhere:
    """A source that computes what it is told to, when it is told to, and keeps who asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[MediaItem, int]] = []
        self.given: list[Future[ProcessedItem]] = []
        self.entered = threading.Semaphore(0)

    def compute(self, item: MediaItem, of: int, local: Callable[[], Future[ProcessedItem]]) -> Future[ProcessedItem]:
        self.asked.append((item, of))
        self.given.append(Future())
        self.entered.release()
        return self.given[-1]


def test_a_source_computes_what_the_cache_lacks_and_the_cache_keeps_it(pool: WarmPool, family: Watched) -> None:
    cache, source = ProcessorCache(10**8), Elsewhere()
    own = MultiModalProcessor("model", cache, pool, LIMITS, 64, source)
    parts = (image_part(), image_part(1), image_part())
    items = identified(own, *parts, options={"max_pixels": 50176})
    with ThreadPoolExecutor(1) as client:
        result = client.submit(own.apply, items, family, None)
        for _ in range(2):
            assert source.entered.acquire(timeout=DEADLINE_S)
        for (item, _), given in zip(source.asked, source.given, strict=True):
            given.set_result(own.process(item, family))
        assert [each.nbytes > 0 for each in result.result(DEADLINE_S)] == [True] * 3
    assert [(item.index, of, dict(item.options)) for item, of in source.asked] == [
        (0, 2, {"max_pixels": 50176}),
        (1, 2, {"max_pixels": 50176}),
    ]
    own.apply(items, family, None)
    assert (len(source.asked), cache.stats.hits, cache.stats.misses) == (2, 2, 2)


def test_a_failing_source_fails_the_request_and_leaves_nothing_under_way(pool: WarmPool, family: Watched) -> None:
    class Failing(Elsewhere):
        def compute(self, item: MediaItem, of: int, local: Callable[[], Any]) -> Future[ProcessedItem]:
            raise MediaError("no", item.index)

    own = MultiModalProcessor("model", ProcessorCache(10**8), pool, LIMITS, 64, Failing())
    for _ in range(2):
        with pytest.raises(MediaError, match="image 0: no"):
            own.apply(identified(own, image_part()), family, None)


async def test_what_an_abandoned_request_alone_waits_for_is_cancelled(pool: WarmPool, family: Watched) -> None:
    source = Elsewhere()
    own = MultiModalProcessor("model", None, pool, LIMITS, 64, source)
    items = identified(own, image_part(), image_part(1))
    requests = WarmPool(2, "render")
    leaving = asyncio.create_task(requests.run(own.apply, items, family, None))
    for _ in range(2):
        assert await asyncio.to_thread(source.entered.acquire, timeout=DEADLINE_S)
    staying = asyncio.create_task(requests.run(own.apply, items[:1], family, None))
    await asyncio.to_thread(wait_until, lambda: own.waiting(items[0]) == 2, DEADLINE_S, "both wait for the first")
    leaving.cancel()
    shared, unshared = sorted(zip(source.asked, source.given, strict=True), key=lambda pair: pair[0][0].index)
    await asyncio.to_thread(wait_until, unshared[1].cancelled, 1, "the second is given up")
    assert not shared[1].cancelled()
    shared[1].set_result(own.process(items[0], family))
    assert len(await staying) == 1
    requests.close()


async def test_an_abandoned_requests_own_items_do_not_keep_the_threads_busy(pool: WarmPool, family: Watched) -> None:
    own, requests = processor(pool), WarmPool(1, "render")
    family.go.clear()
    task = asyncio.create_task(requests.run(own.apply, identified(own, *map(image_part, range(9))), family, None))
    for _ in range(pool.size):
        assert await asyncio.to_thread(family.entered.acquire, timeout=DEADLINE_S)
    task.cancel()
    await requests.run(int)
    family.go.set()
    await asyncio.to_thread(lambda: [pool.submit(int).result(DEADLINE_S) for _ in range(3)])
    assert sum(family.processed.values()) == pool.size
    requests.close()


def test_one_item_can_be_asked_for_without_waiting(pool: WarmPool, family: Watched) -> None:
    own = processor(pool, ProcessorCache(10**8))
    (item,) = identified(own, image_part())
    family.go.clear()
    futures = [own.submit(item, family) for _ in range(3)]
    assert family.entered.acquire(timeout=DEADLINE_S)
    assert futures[0].cancel()
    assert own.waiting(item) == 2, "who leaves takes nothing from the others"
    family.go.set()
    first, second = (future.result(DEADLINE_S) for future in futures[1:])
    assert first is second
    assert own.submit(item, family).result(0) is first, "the cache has it"
    assert list(family.processed.values()) == [1]


def test_an_item_that_was_asked_for_alone_is_given_up_with_its_future(pool: WarmPool, family: Watched) -> None:
    own = processor(pool)
    family.go.clear()
    blocking = [pool.submit(family.go.wait) for _ in range(pool.size)]
    (item,) = identified(own, image_part())
    assert own.submit(item, family).cancel()
    family.go.set()
    assert all(done.result(DEADLINE_S) for done in blocking)
    assert sum(family.processed.values()) == 0
    (broken,) = identified(own, ImagePart(data=photo()[:-400]))
    assert isinstance(own.submit(broken, family).exception(DEADLINE_S), MediaError)


def test_an_item_asked_for_alone_waits_for_no_work_that_is_elsewhere(pool: WarmPool, family: Watched) -> None:
    """The one who asks may be the very replica that the work went to, or wait for its answer."""
    source = Elsewhere()
    own, requests = MultiModalProcessor("model", None, pool, LIMITS, 64, source), WarmPool(1, "render")
    (item,) = identified(own, image_part())
    waiting = requests.submit(own.apply, (item,), family, None)
    wait_until(lambda: len(source.given) == 1, DEADLINE_S, "the item has gone elsewhere")
    processed = own.submit(item, family).result(DEADLINE_S)
    assert not waiting.done()
    source.given[0].set_result(processed)
    assert waiting.result(DEADLINE_S) == (processed,)
    requests.close()


def test_an_item_that_comes_while_the_look_at_it_ends_is_no_timeout(pool: WarmPool, family: Watched) -> None:
    (item,) = identified(processor(pool), image_part())
    processed = processor(pool).process(item, family)
    assert _awaited(late(processed), item) is processed
    with pytest.raises(TimeoutError, match="its own"):
        _awaited(late(TimeoutError("its own")), item)


def late(outcome: ProcessedItem | Exception) -> _Job:
    """Work that ends between the end of the first wait and the look at whether it has ended."""

    class Late(Future[ProcessedItem]):
        def result(self, timeout: float | None = None) -> ProcessedItem:
            if self.done():
                return super().result(timeout)
            if isinstance(outcome, Exception):
                self.set_exception(outcome)
            else:
                self.set_result(outcome)
            raise TimeoutError

    job = _Job("key", here=True)
    job.item = Late()
    return job

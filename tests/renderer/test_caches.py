"""The sender decides, the receiver obeys: whatever happens in between, the two hold the same."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from renderer.caches import CacheStats, ProcessedItem, ProcessorCache, SenderCache, Submission
from renderer.errors import CacheMissError
from renderer.prompt import ImageSize, PlaceholderRange, PromptItem

KEYS = [f"key{number}" for number in range(6)]
# Some items are larger than the cache of most runs.
BYTES = dict(zip(KEYS, (10, 20, 30, 40, 50, 90), strict=True))


def processed(key: str) -> ProcessedItem:
    return ProcessedItem(ImageSize(1, 1), {"pixels": np.full(BYTES[key], KEYS.index(key), np.uint8)}, BYTES[key])


def prompt_item(key: str, with_tensors: bool) -> PromptItem:
    tensors = processed(key).tensors if with_tensors else None
    return PromptItem(key, key, PlaceholderRange(0, 1), tensors, ImageSize(1, 1))


class Receiver:
    """A receiver cache that does as it is told, and fails where it cannot."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.tensors_received = 0

    def obey(self, submission: Submission) -> list[int]:
        """What the receiver takes each item of a submission for."""
        for key in submission.drop:
            del self.held[key]
        passing: dict[str, int] = {}
        answers = []
        for item in submission.items:
            if item.tensors is not None:
                self.tensors_received += 1
                value = int(item.tensors["pixels"][0])
                (self.held if item.keep else passing)[item.cache_key] = value
            found = passing.get(item.cache_key)
            answers.append(self.held[item.cache_key] if found is None else found)
        return answers


class Rendering:
    """A request between its look-up and its end."""

    def __init__(self, cache: SenderCache, keys: list[str]) -> None:
        self.lease = cache.lease()
        self.keys = keys
        held = {key: cache.look_up(key, self.lease) for key in set(keys)}
        self.items = [prompt_item(key, with_tensors=held[key] is None) for key in keys]
        self.claimed = {key for key in keys if held[key] is not None}


class SenderAndReceiver(RuleBasedStateMachine):
    """Requests in any interleaving, with clients that leave, cleared caches and engines that restart."""

    rendered: Bundle[Rendering] = Bundle("rendered")
    running: Bundle[Rendering] = Bundle("running")

    @initialize(capacity=st.sampled_from([0, 45, 60, 100, 1000]))
    def start(self, capacity: int) -> None:
        self.capacity = capacity
        self.cache = SenderCache(capacity)
        self.receiver = Receiver()
        self.committed = 0
        self.sent = 0
        self.counted_before = 0

    @rule(target=rendered, keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4))
    def render(self, keys: list[str]) -> Rendering:
        before = (self.cache.keys(), self.cache.stats)
        rendering = Rendering(self.cache, keys)
        assert self.cache.keys() == before[0]
        stats = self.cache.stats
        assert (stats.hits, stats.misses, stats.entries) == (before[1].hits, before[1].misses, before[1].entries)
        return rendering

    @rule(target=running, rendering=consumes(rendered))
    def submit(self, rendering: Rendering) -> Rendering:
        stats = self.cache.stats
        gone = rendering.claimed - set(self.cache.keys())
        if gone:
            with pytest.raises(CacheMissError):
                self.cache.commit(rendering.items)
            assert self.cache.stats == stats
            rendering.lease.close()
            return multiple()  # type: ignore[return-value]
        received = self.receiver.tensors_received
        submission = self.cache.commit(rendering.items)
        assert self.receiver.obey(submission) == [KEYS.index(key) for key in rendering.keys]
        now = self.cache.stats
        assert now.misses - stats.misses == self.receiver.tensors_received - received
        assert now.hits + now.misses - stats.hits - stats.misses == len(rendering.items)
        assert set(self.receiver.held) == set(self.cache.keys())
        return rendering

    @rule(rendering=consumes(rendered))
    def leave_before_submission(self, rendering: Rendering) -> None:
        rendering.lease.close()

    @rule(rendering=consumes(running))
    def end(self, rendering: Rendering) -> None:
        rendering.lease.close()
        rendering.lease.close()

    @rule()
    def clear(self) -> None:
        self.cache.clear_cache()
        stats = self.cache.stats
        assert (stats.hits, stats.misses, stats.evictions, stats.uncached) == (0, 0, 0, 0)

    @rule()
    def restart_the_engine(self) -> None:
        self.receiver = Receiver()
        self.cache.reset()

    @invariant()
    def nothing_drifts(self) -> None:
        held, stats = self.cache.keys(), self.cache.stats
        assert set(held) <= set(self.receiver.held)
        assert stats.entries == len(held)
        assert stats.bytes == sum(BYTES[key] for key in held) <= self.capacity


TestSenderAndReceiver = SenderAndReceiver.TestCase


def commit(cache: SenderCache, *keys: str) -> Submission:
    """A whole request, up to its submission; its pins are released."""
    rendering = Rendering(cache, list(keys))
    submission = cache.commit(rendering.items)
    rendering.lease.close()
    return submission


def test_the_second_submission_of_an_item_sends_no_tensors() -> None:
    cache = SenderCache(100)
    assert commit(cache, "key0").items[0].tensors is not None
    assert commit(cache, "key0").items[0].tensors is None
    assert cache.stats == CacheStats(entries=1, bytes=10, hits=1, misses=1)


def test_an_item_twice_in_a_request_is_sent_once() -> None:
    submission = commit(SenderCache(100), "key0", "key0")
    assert [item.tensors is None for item in submission.items] == [False, True]


def test_a_look_up_alone_leaves_no_trace() -> None:
    cache = SenderCache(100)
    commit(cache, "key0")
    commit(cache, "key1")
    before = (cache.keys(), cache.stats)
    with cache.lease() as lease:
        cache.look_up("key0", lease)
        cache.look_up("key2", lease)
        assert cache.stats.pinned == 1
    assert (cache.keys(), cache.stats) == before


def test_the_least_recently_submitted_item_is_dropped_first() -> None:
    cache = SenderCache(60)
    for key in ("key0", "key1", "key0"):
        commit(cache, key)
    assert commit(cache, "key3").drop == ("key1",)
    assert cache.keys() == ("key0", "key3")
    assert cache.stats.evictions == 1


def test_a_pinned_item_is_never_dropped() -> None:
    cache = SenderCache(60)
    commit(cache, "key0")
    with cache.lease() as lease:
        cache.look_up("key0", lease)
        commit(cache, "key1")
        assert commit(cache, "key3").drop == ("key1",)
        assert cache.keys() == ("key0", "key3")


def test_where_pins_leave_no_room_an_item_passes_uncached_and_nothing_is_dropped() -> None:
    cache = SenderCache(60)
    commit(cache, "key0")
    running = Rendering(cache, ["key3"])
    cache.commit(running.items)
    submission = commit(cache, "key2", "key2")
    assert submission.drop == ()
    assert [(item.keep, item.tensors is None) for item in submission.items] == [(False, False), (True, True)]
    assert cache.keys() == ("key0", "key3")
    assert cache.stats.uncached == 1
    running.lease.close()


def test_a_requests_own_items_do_not_drop_each_other() -> None:
    cache = SenderCache(60)
    submission = cache.commit([prompt_item("key2", True), prompt_item("key3", True)])
    assert submission.drop == ()
    assert [item.keep for item in submission.items] == [True, False]
    assert cache.keys() == ("key2",)


def test_an_item_that_came_without_tensors_and_is_not_held_changes_nothing() -> None:
    cache = SenderCache(100)
    commit(cache, "key0")
    before = (cache.keys(), cache.stats)
    with pytest.raises(CacheMissError, match="not held"):
        cache.commit([prompt_item("key1", True), prompt_item("key2", False)])
    assert (cache.keys(), cache.stats) == before


def test_after_clearing_the_receiver_drops_everything_with_the_next_submission() -> None:
    cache = SenderCache(100)
    commit(cache, "key0")
    commit(cache, "key1")
    cache.clear_cache()
    assert cache.stats == CacheStats()
    submission = commit(cache, "key1")
    assert submission.drop == ("key0", "key1")
    assert submission.items[0].tensors is not None


def test_an_item_pinned_while_the_cache_is_cleared_goes_when_it_is_unpinned() -> None:
    cache = SenderCache(100)
    commit(cache, "key0")
    running = Rendering(cache, ["key0"])
    cache.clear_cache()
    assert cache.commit(running.items).items[0].tensors is None
    assert cache.keys() == ("key0",)
    running.lease.close()
    assert cache.keys() == ()
    assert commit(cache, "key1").drop == ("key0",)


def test_a_look_up_needs_an_open_lease() -> None:
    cache = SenderCache(100)
    lease = cache.lease()
    lease.close()
    for refused in (None, lease):
        with pytest.raises(ValueError, match="lease"):
            cache.look_up("key0", refused)
    assert cache.stats.pinned == 0


def test_a_processor_cache_keeps_what_was_used_last() -> None:
    cache = ProcessorCache(60)
    for key in ("key0", "key1"):
        cache.store(key, processed(key))
    assert cache.look_up("key0") is not None
    cache.store("key3", processed("key3"))
    assert cache.look_up("key1") is None
    assert cache.look_up("key0") is not None
    assert cache.stats == CacheStats(entries=2, bytes=50, hits=2, misses=1, evictions=1)


def test_a_processor_cache_passes_an_item_larger_than_itself() -> None:
    cache = ProcessorCache(60)
    cache.store("key0", processed("key0"))
    cache.store("key5", processed("key5"))
    assert cache.stats == CacheStats(entries=1, bytes=10, uncached=1)


def test_a_processor_cache_counts_an_item_stored_twice_once() -> None:
    cache = ProcessorCache(60)
    for _ in range(3):
        cache.store("key1", processed("key1"))
    assert cache.stats == CacheStats(entries=1, bytes=20)


def test_a_cleared_processor_cache_is_as_new() -> None:
    cache = ProcessorCache(60)
    cache.store("key0", processed("key0"))
    cache.look_up("key0")
    cache.look_up("key1")
    cache.clear_cache()
    assert cache.stats == CacheStats()


def test_a_processor_cache_needs_no_lease() -> None:
    assert ProcessorCache(60).lease() is None


def test_a_random_mix_stays_within_its_bytes() -> None:
    rng = random.Random(7)
    cache = ProcessorCache(60)
    for _ in range(2000):
        key = rng.choice(KEYS)
        item = cache.look_up(key)
        if item is None:
            cache.store(key, processed(key))
        else:
            assert item.tensors is not None
            assert int(item.tensors["pixels"][0]) == KEYS.index(key)
        assert cache.stats.bytes <= 60


def test_closing_a_lease_forgets_its_keys() -> None:
    cache = SenderCache(100)
    lease = cache.lease()
    cache.look_up("key0", lease)
    assert lease.keys == ["key0"]
    lease.close()
    assert lease.keys == []


def test_many_threads_and_one_receiver_do_not_drift() -> None:
    cache, receiver, in_order = SenderCache(100), Receiver(), threading.Lock()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            rendering = Rendering(cache, rng.choices(KEYS, k=rng.randint(1, 3)))
            if rng.random() < 0.8:
                with in_order:
                    answers = receiver.obey(cache.commit(rendering.items))
                assert answers == [KEYS.index(key) for key in rendering.keys]
            rendering.lease.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))
    assert set(receiver.held) == set(cache.keys())
    assert receiver.tensors_received == cache.stats.misses
    assert cache.stats.pinned == 0

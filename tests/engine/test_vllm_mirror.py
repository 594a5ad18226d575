"""What the mirror claims, the receiver holds; without it vLLM answers a request with an error."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.vllm_mirror import SentItem, VllmSenderCache
from renderer.errors import CacheMissError
from renderer.prompt import PlaceholderRange, PromptItem

CAPACITY = 1000
# What empties the caches comes after so many requests at the earliest, or there would be nothing in them to miss.
CALM = 8


class Receiver:
    """vLLM's receiver cache: an LRU in bytes that takes the items of a request one after the other."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: OrderedDict[str, int] = OrderedDict()

    def take(self, items: tuple[SentItem, ...]) -> list[str]:
        """The keys that are missing."""
        for item in items:
            if item.cache_key in self.items:
                self.items.move_to_end(item.cache_key)
        missing = []
        for item in items:
            if item.by_reference and item.cache_key not in self.items:
                missing.append(item.cache_key)
            elif item.by_reference:
                self.items.move_to_end(item.cache_key)
            else:
                self._store(item)
        return missing

    def _store(self, item: SentItem) -> None:
        self.items.pop(item.cache_key, None)
        if item.nbytes > self.capacity:
            return
        while sum(self.items.values()) + item.nbytes > self.capacity:
            self.items.popitem(last=False)
        self.items[item.cache_key] = item.nbytes


def prompt_item(key: str, nbytes: int, with_tensors: bool = True) -> PromptItem:
    tensors = {"pixel_values": np.zeros(nbytes, np.uint8)} if with_tensors else None
    return PromptItem(key, key, PlaceholderRange(0, 1), tensors)


def size_of(number: int) -> int:
    """Of an item by its number: some are larger than the budget, one is larger than the receiver."""
    return (110, 230, 310, 420, 890, 950, 1100)[number % 7]


class MirrorMachine(RuleBasedStateMachine):
    """Requests that arrive, are refused or are lost, in any order, with look-ups that are old by then."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = VllmSenderCache(CAPACITY)
        self.receiver = Receiver(CAPACITY)
        self.calm = 0

    @rule(
        numbers=st.lists(st.integers(0, 9), min_size=1, max_size=4),
        fate=st.sampled_from(["arrives", "arrives", "arrives", "refused", "lost", "uncertain"]),
        forget=st.booleans(),
    )
    def request(self, numbers: list[int], fate: str, forget: bool) -> None:
        keys = [(f"item-{number}", size_of(number)) for number in numbers]
        items = [prompt_item(key, size, not (forget and self.mirror.look_up(key) is not None)) for key, size in keys]
        self.calm += 1
        try:
            sent = self.mirror.plan(items)
        except CacheMissError:
            items = [prompt_item(key, size, self.mirror.look_up(key) is None) for key, size in keys]
            sent = self.mirror.plan(items)
        if fate == "refused":
            return
        if fate != "lost":
            assert self.receiver.take(sent) == []
        self.mirror.apply(sent, sure=fate == "arrives")

    @precondition(lambda self: self.calm >= CALM)
    @rule()
    def forgotten(self) -> None:
        self.calm = 0
        self.mirror.clear_cache()

    @precondition(lambda self: self.calm >= CALM)
    @rule()
    def restarted(self) -> None:
        self.calm = 0
        self.receiver.items.clear()
        self.mirror.reset()

    @invariant()
    def claims_are_true(self) -> None:
        assert set(self.mirror.keys()) <= set(self.receiver.items)
        assert self.mirror.stats.bytes <= CAPACITY


TestMirror = MirrorMachine.TestCase
TestMirror.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_an_item_crosses_once_and_then_by_reference() -> None:
    mirror = VllmSenderCache(CAPACITY)
    first = mirror.plan([prompt_item("a", 100), prompt_item("a", 100)])
    assert [item.by_reference for item in first] == [False, True]
    mirror.apply(first)
    assert [item.by_reference for item in mirror.plan([prompt_item("a", 100, with_tensors=False)])] == [True]
    assert (mirror.stats.hits, mirror.stats.misses, mirror.stats.bytes) == (1, 1, 100)


def test_a_look_up_changes_nothing() -> None:
    mirror = VllmSenderCache(CAPACITY)
    mirror.apply(mirror.plan([prompt_item("a", 100)]))
    before = mirror.stats
    assert mirror.look_up("a") is not None
    assert mirror.look_up("b") is None
    assert mirror.stats == before


def test_an_item_that_is_gone_by_its_request_is_a_miss() -> None:
    with pytest.raises(CacheMissError):
        VllmSenderCache(CAPACITY).plan([prompt_item("a", 100, with_tensors=False)])


def test_items_that_do_not_fit_together_are_looked_up_in_vain_from_then_on() -> None:
    mirror = VllmSenderCache(CAPACITY)
    mirror.apply(mirror.plan([prompt_item("a", 600)]))
    with pytest.raises(CacheMissError):
        mirror.plan([prompt_item("a", 600, with_tensors=False), prompt_item("b", 600)])
    assert mirror.look_up("a") is None
    assert not any(item.by_reference for item in mirror.plan([prompt_item("a", 600), prompt_item("b", 600)]))


def test_a_receiver_that_cannot_be_mirrored_is_always_sent_tensors() -> None:
    mirror = VllmSenderCache(CAPACITY)
    mirror.disable()
    mirror.apply(mirror.plan([prompt_item("a", 100)]))
    assert mirror.look_up("a") is None
    assert mirror.stats.uncached == 1

"""The receiver holds what the sender believes, and each request gets the tensors of its own items.

Random submissions, with look-ups that are submitted late, out of order or never, against the sender cache itself: items
hashed here, and items that tenants claim under the same hashes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.receiver import ReceiverCache
from renderer.caches import Lease, SenderCache, Submission, SubmittedItem
from renderer.errors import CacheMissError, EngineError
from renderer.hashing import content_key, foreign_key
from renderer.prompt import PlaceholderRange, PromptItem, Tensors

UNIT = 100
HASHES = ("a", "b", "c")
# What is hashed here, and what tenants claim to be the same: every pairing shows something else. There are few of them,
# so that requests meet.
KEYS = (
    *(content_key(digest) for digest in HASHES),
    *(foreign_key(salt, digest, 1) for salt in (None, "one", "other") for digest in HASHES[:1]),
)
FOREIGN = range(len(HASHES), len(KEYS))
# What empties the caches comes after so many submissions at the earliest, or there would be nothing in them to lose.
CALM = 8


def tensors_of(index: int) -> Tensors:
    """Some items are larger than others."""
    return {"pixel_values": np.full(UNIT * (1 + index % 3), index, dtype=np.uint8)}


def item_of(index: int, held: bool) -> PromptItem:
    digest = HASHES[0] if index in FOREIGN else HASHES[index]
    return PromptItem(digest, KEYS[index], PlaceholderRange(0, 1), None if held else tensors_of(index))


def index_of(key: str) -> int:
    return KEYS.index(key)


class SenderAndReceiver(RuleBasedStateMachine):
    """A budget of one to three items; prompts are rendered, then submitted, cancelled, or finished, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.sender = SenderCache(3 * UNIT)
        self.receiver = ReceiverCache()
        self.rendered: list[tuple[list[PromptItem], Lease, int]] = []
        self.running: list[Lease] = []
        self.sent = 0
        self.restarts = 0
        self.calm = 0

    @rule(
        indices=st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=3),
        fate=st.sampled_from(["waits", "runs", "ends", "ends"]),
    )
    def ask(self, indices: list[int], fate: str) -> None:
        """Render a prompt. It may be submitted later, or never, or at once and go on for a while."""
        lease = self.sender.lease()
        items = [item_of(index, self.sender.look_up(KEYS[index], lease) is not None) for index in indices]
        if fate == "waits":
            self.rendered.append((items, lease, self.restarts))
            return
        self.submit(items, self.restarts)
        if fate == "ends":
            lease.close()
        else:
            self.running.append(lease)

    @precondition(lambda self: self.rendered)
    @rule(data=st.data())
    def submit_late(self, data: st.DataObject) -> None:
        items, lease, restarts = self.rendered.pop(data.draw(st.integers(0, len(self.rendered) - 1)))
        self.submit(items, restarts)
        self.running.append(lease)

    def submit(self, items: list[PromptItem], restarts: int) -> None:
        self.calm += 1
        if self.lost(items):
            assert restarts < self.restarts, "what is pinned is lost with its receiver alone"
            before = self.sender.keys(), self.sender.stats
            with pytest.raises(CacheMissError):
                self.sender.commit(items)
            assert (self.sender.keys(), self.sender.stats) == before
            items = [item_of(index_of(item.cache_key), held=False) for item in items]  # rendered again
        submission = self.sender.commit(items)
        got = self.receiver.obey(submission)
        self.sent += sum(item.tensors is not None for item in submission.items)
        for item, tensors in zip(items, got, strict=True):
            assert np.array_equal(tensors["pixel_values"], tensors_of(index_of(item.cache_key))["pixel_values"])

    def lost(self, items: list[PromptItem]) -> bool:
        """Whether an item comes without tensors that neither the receiver nor an earlier place of the prompt has."""
        there = set(self.receiver.keys())
        for item in items:
            if item.tensors is None and item.cache_key not in there:
                return True
            there.add(item.cache_key)
        return False

    @rule(index=st.sampled_from(FOREIGN))
    def claim_without_data(self, index: int) -> None:
        """A caller names an item that it sends no data of."""
        before, stats = self.sender.keys(), self.sender.stats
        with self.sender.lease() as lease:
            self.sender.look_up(KEYS[index], lease)
            if KEYS[index] not in before:
                with pytest.raises(CacheMissError):
                    self.sender.commit([item_of(index, held=True)])
                assert self.sender.keys() == before
                assert (self.sender.stats.hits, self.sender.stats.misses) == (stats.hits, stats.misses)
                return
            (got,) = self.receiver.obey(self.sender.commit([item_of(index, held=True)]))
            assert np.array_equal(got["pixel_values"], tensors_of(index)["pixel_values"])

    @precondition(lambda self: self.rendered)
    @rule(data=st.data())
    def cancel_before_submission(self, data: st.DataObject) -> None:
        _, lease, _ = self.rendered.pop(data.draw(st.integers(0, len(self.rendered) - 1)))
        lease.close()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        lease = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        lease.close()

    @precondition(lambda self: self.calm >= CALM)
    @rule()
    def restart(self) -> None:
        self.calm = 0
        self.sender.reset()
        self.receiver = ReceiverCache()
        self.restarts += 1

    @precondition(lambda self: self.calm >= CALM)
    @rule()
    def reset_cache(self) -> None:
        self.calm = 0
        self.sender.clear_cache()
        self.sent = 0
        for key in self.sender.commit(()).drop:
            self.receiver.drop(key)

    @invariant()
    def the_receiver_holds_what_the_sender_believes(self) -> None:
        assert set(self.sender.keys()) <= self.receiver.keys()
        pending = self.receiver.keys() - set(self.sender.keys())
        assert pending <= set(self.sender._pending_drops)
        assert self.receiver.bytes <= 3 * UNIT + sum(
            tensors_of(index_of(key))["pixel_values"].nbytes for key in pending
        )
        assert self.sender.stats.bytes <= 3 * UNIT
        assert self.sender.stats.misses == self.sent


TestSenderAndReceiver = SenderAndReceiver.TestCase
TestSenderAndReceiver.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_drops_come_before_items() -> None:
    receiver = ReceiverCache()
    receiver.obey(Submission((), (SubmittedItem("a", tensors_of(1)),)))
    receiver.obey(Submission(("a",), (SubmittedItem("a", tensors_of(2)),)))
    assert receiver.keys() == {"a"}
    assert receiver.bytes == tensors_of(2)["pixel_values"].nbytes


def test_an_item_that_is_not_kept_lives_with_its_request_alone() -> None:
    receiver = ReceiverCache()
    items = (SubmittedItem("a", tensors_of(1), keep=False), SubmittedItem("a", None))
    first, second = receiver.obey(Submission((), items))
    assert first is second
    assert len(receiver) == receiver.bytes == 0


def test_a_missing_item_is_an_error_of_its_request_and_the_others_are_stored() -> None:
    receiver = ReceiverCache()
    with pytest.raises(EngineError, match="absent"):
        receiver.obey(Submission((), (SubmittedItem("absent", None), SubmittedItem("b", tensors_of(1)))))
    assert receiver.keys() == {"b"}


def test_a_replaced_item_counts_once() -> None:
    receiver = ReceiverCache()
    item = SubmittedItem("a", tensors_of(0))
    receiver.obey(Submission((), (item, dataclasses.replace(item, tensors=tensors_of(1)))))
    assert receiver.bytes == tensors_of(1)["pixel_values"].nbytes

"""The block pool never hands out a block twice, never loses one, and knows a prefix as long as its blocks last."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.blocks import NULL_BLOCK, BlockPool, block_hash, root_hash

BLOCKS = 6
TOKENS = np.arange(4, dtype=np.int32)


def take_all(pool: BlockPool, count: int) -> list[int]:
    assert pool.admit((), count)
    return [pool.take() for _ in range(count)]


def test_blocks_are_handed_out_once_and_come_back() -> None:
    pool = BlockPool(BLOCKS)
    blocks = take_all(pool, BLOCKS)
    assert sorted(blocks) == list(range(1, BLOCKS + 1))
    assert NULL_BLOCK not in blocks
    assert not pool.admit((), 1)
    pool.release(blocks[:2], unused=0)
    assert pool.available == 2
    assert pool.used == BLOCKS - 2


def test_a_reservation_that_is_not_used_comes_back() -> None:
    pool = BlockPool(BLOCKS)
    assert pool.admit((), 4)
    block = pool.take()
    assert pool.available == 2
    pool.release([block], unused=3)
    assert pool.available == BLOCKS


def test_a_published_prefix_is_found_until_its_block_is_needed() -> None:
    pool = BlockPool(2)
    first, second = take_all(pool, 2)
    pool.publish(first, b"a")
    pool.publish(second, b"ab")
    pool.release([first, second], unused=0)
    assert pool.match([b"a", b"ab", b"abc"]) == [first, second]
    # The end of a prefix goes before its beginning, without which it is of no use.
    assert take_all(pool, 1) == [second]
    assert pool.match([b"a", b"ab"]) == [first]


def test_unpublished_blocks_are_used_before_published_ones() -> None:
    pool = BlockPool(3)
    blocks = take_all(pool, 3)
    pool.publish(blocks[0], b"a")
    pool.release(blocks, unused=0)
    assert set(take_all(pool, 2)) == set(blocks[1:])
    assert pool.match([b"a"]) == [blocks[0]]


def test_a_shared_block_stays_until_its_last_holder_is_gone() -> None:
    pool = BlockPool(2)
    (block,) = take_all(pool, 1)
    pool.publish(block, b"a")
    assert pool.admit([block], 0)
    pool.release([block], unused=0)
    assert pool.used == 1
    pool.release([block], unused=0)
    assert pool.used == 0


def test_idle_blocks_that_a_request_shares_do_not_count_as_free_for_it() -> None:
    pool = BlockPool(2)
    blocks = take_all(pool, 2)
    pool.publish(blocks[0], b"a")
    pool.release(blocks, unused=0)
    assert not pool.admit([blocks[0]], 2)
    assert pool.used == 0
    assert pool.admit([blocks[0]], 1)


def test_cleared_prefixes_are_not_found_and_held_blocks_stay_held() -> None:
    pool = BlockPool(2)
    (block,) = take_all(pool, 1)
    pool.publish(block, b"a")
    pool.clear_prefixes()
    assert pool.match([b"a"]) == []
    assert pool.used == 1


def test_equal_text_with_different_images_has_different_hashes() -> None:
    hashes = {
        block_hash(root_hash(None), TOKENS, items)
        for items in ([], [("cat", 0)], [("dog", 0)], [("cat", 1)], [("cat", -4)], [("cat", 0), ("dog", 2)])
    }
    assert len(hashes) == 6


@given(
    st.lists(st.tuples(st.text(max_size=3), st.integers(-3, 3)), max_size=3),
    st.lists(st.tuples(st.text(max_size=3), st.integers(-3, 3)), max_size=3),
)
def test_different_items_never_read_alike(first: list[tuple[str, int]], second: list[tuple[str, int]]) -> None:
    equal = block_hash(b"", TOKENS, first) == block_hash(b"", TOKENS, second)
    assert equal == (first == second)


def test_salts_part_equal_prefixes() -> None:
    salts = (None, "", "a", "b")
    assert len({root_hash(salt) for salt in salts}) == len(salts)


class Pool(RuleBasedStateMachine):
    """Requests come, grow and go at random; shared prefixes are those of a few texts."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.held: list[list[int]] = []
        self.left: list[int] = []
        self.texts: list[int] = []

    @rule(text=st.integers(0, 2), length=st.integers(1, 4))
    def admit(self, text: int, length: int) -> None:
        shared = self.pool.match([bytes([text, index]) for index in range(length - 1)])
        if self.pool.admit(shared, length - len(shared)):
            self.held.append(list(shared))
            self.left.append(length - len(shared))
            self.texts.append(text)

    @precondition(lambda self: any(self.left))
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from([index for index, left in enumerate(self.left) if left]))
        block = self.pool.take()
        assert all(block not in blocks for blocks in self.held)
        self.held[index].append(block)
        self.left[index] -= 1
        self.pool.publish(block, bytes([self.texts[index], len(self.held[index]) - 1]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index), self.left.pop(index))
        self.texts.pop(index)

    @invariant()
    def every_block_is_held_or_idle(self) -> None:
        held = {block for blocks in self.held for block in blocks}
        assert self.pool.used == len(held)
        assert self.pool.available == BLOCKS - len(held) - sum(self.left)
        assert self.pool.available >= 0


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

"""The pool of KV blocks: who holds which, and which of them hold a known prefix.

A block without a holder keeps its content, and its place in the prefix cache, until it is needed for something else;
the least recently used one goes first. Requests reserve what they may come to need when they are admitted, so a
request that runs never lacks a block.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

NULL_BLOCK = 0  # padding of block tables points here; it is never handed out
HASH_BYTES = 32


class BlockPool:
    """Block numbers 1 to `num_blocks`."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._holders = [0] * (num_blocks + 1)
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._reserved = 0

    @property
    def available(self) -> int:
        """Blocks that a new request may reserve."""
        return len(self._idle) - self._reserved

    @property
    def used(self) -> int:
        """Blocks that some request holds."""
        return self.num_blocks - len(self._idle)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def admit(self, shared: Sequence[int], new: int) -> bool:
        """Hold the shared blocks and reserve `new` more; False, and nothing done, where they are not available."""
        revived = sum(block in self._idle for block in shared)
        if revived + new > self.available:
            return False
        for block in shared:
            self._holders[block] += 1
            self._idle.pop(block, None)
        self._reserved += new
        return True

    def take(self) -> int:
        """One block out of the caller's reservation; what it held is forgotten."""
        block, _ = self._idle.popitem(last=False)
        self._forget(block)
        self._holders[block] = 1
        self._reserved -= 1
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """The block holds this prefix from now on. A second block of equal content stays unpublished."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def release(self, blocks: Sequence[int], unused: int) -> None:
        """Give back a request's blocks, in prompt order, and what is left of its reservation."""
        self._reserved -= unused
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._idle[block] = None
                self._idle.move_to_end(block, last=block in self._hash_of)

    def clear_prefixes(self) -> None:
        """Forget every prefix; blocks that are held stay held."""
        self._hash_of.clear()
        self._block_of.clear()

    def _forget(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]


def root_hash(cache_salt: str | None) -> bytes:
    """What the first block's hash continues: prefixes under different salts have nothing in common."""
    return hashlib.sha256(b"" if cache_salt is None else b"salt:" + cache_salt.encode()).digest()


def block_hash(previous: bytes, token_ids: NDArray[np.int32], items: Iterable[tuple[str, int]]) -> bytes:
    """Hash of a prefix that ends with one full block.

    Args:
        previous: Hash of the prefix before the block.
        token_ids: int32 [block size].
        items: Cache key of every item that reaches into the block, and the item's offset from the block's start:
            placeholder tokens are equal for all images, so the tokens alone do not tell what they stand for.
    """
    digest = hashlib.sha256(previous)
    digest.update(token_ids.tobytes())
    for cache_key, offset in items:
        digest.update(f"{len(cache_key)}:{cache_key}@{offset};".encode())
    return digest.digest()

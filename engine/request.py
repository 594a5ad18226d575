"""One request inside the core: its tokens, how far they are computed, and what it holds."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from engine.blocks import block_hash, root_hash
from engine.grammar import Grammar
from engine.protocol import SamplingParams
from renderer.prompt import PlaceholderRange, Tensors


@dataclass(slots=True, eq=False)
class RequestItem:
    """One media item of a request; `embeds` [embeddings, features] from its encoding until its tokens are computed."""

    cache_key: str
    range: PlaceholderRange
    tensors: Tensors
    embeds: torch.Tensor | None = None

    def features(self, start: int, end: int) -> tuple[NDArray[np.int64], torch.Tensor]:
        """Tokens of the prompt from `start` to `end` that carry an embedding of this item, and the embeddings."""
        if self.embeds is None:
            raise RuntimeError(f"item {self.cache_key} is not encoded")
        mask = self.range.embed_mask
        carriers = np.arange(self.range.length) if mask is None else np.flatnonzero(mask)
        tokens = carriers + self.range.offset
        first, last = np.searchsorted(tokens, (start, end))
        return tokens[first:last], self.embeds[first:last]


@dataclass(slots=True, eq=False)
class Request:
    """Tokens of prompt and output in one array with room for `max_tokens`.

    Attributes:
        tokens: int32 [prompt + max_tokens]; the first `num_tokens` are known.
        num_prompt: How many of them are the prompt's. Output begins there, what another replica produced included.
        positions: int64 [rows, num_prompt], rotary positions; a token of the output is at its index plus `delta`.
        computed: Tokens whose keys and values are in the blocks.
        cached: Prompt tokens that the prefix cache served.
        block_table: int32 [blocks that it may come to need]; the first `num_blocks` are held.
        hashes: Of its full blocks, as far as they were needed.
    """

    key: int
    tokens: NDArray[np.int32]
    num_prompt: int
    num_tokens: int
    params: SamplingParams
    items: tuple[RequestItem, ...]
    positions: NDArray[np.int64]
    delta: int
    cache_salt: str | None
    seed: int
    grammar: Grammar | None
    block_table: NDArray[np.int32]
    num_blocks: int = 0
    computed: int = 0
    cached: int = 0
    published: int = 0
    hashes: list[bytes] = field(default_factory=list)

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def output_ids(self) -> NDArray[np.int32]:
        return self.tokens[self.num_prompt : self.num_tokens]

    @property
    def blocks(self) -> list[int]:
        return [int(block) for block in self.block_table[: self.num_blocks]]

    @property
    def is_decoding(self) -> bool:
        """Whether one token is left to compute, and it is of the output: one of the prompt may need an item."""
        return self.num_tokens - self.computed == 1 and self.computed >= self.num_prompt

    def append(self, token_id: int) -> bool:
        """Add a token; False where the grammar does not go on with it."""
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        return self.grammar is None or self.grammar.advance([token_id])

    def advance(self, computed: int) -> None:
        """Keys and values are there for so many tokens; of items before that nothing is needed any more."""
        self.computed = computed
        for item in self.items:
            if item.range.end <= computed:
                item.tensors, item.embeds = {}, None

    def hash_blocks(self, count: int, block_size: int) -> list[bytes]:
        """Hashes of the first `count` blocks, which are full."""
        while len(self.hashes) < count:
            start = len(self.hashes) * block_size
            previous = self.hashes[-1] if self.hashes else root_hash(self.cache_salt)
            touching = self._items_in(start, start + block_size)
            self.hashes.append(block_hash(previous, self.tokens[start : start + block_size], touching))
        return self.hashes[:count]

    def positions_of(self, start: int, end: int) -> NDArray[np.int64]:
        """int64 [rows, end - start]."""
        prompt = self.positions[:, start : min(end, self.num_prompt)]
        if end <= self.num_prompt:
            return prompt
        output = np.arange(max(start, self.num_prompt), end, dtype=np.int64) + self.delta
        return np.concatenate([prompt, np.broadcast_to(output, (len(self.positions), len(output)))], axis=1)

    def _items_in(self, start: int, end: int) -> Iterator[tuple[str, int]]:
        for item in self.items:
            if item.range.offset < end and item.range.end > start:
                yield item.cache_key, item.range.offset - start


def new_seed(params: SamplingParams) -> int:
    """The request's seed, or one that nobody could foretell."""
    return secrets.randbits(63) if params.seed is None else params.seed

"""Attention over paged keys and values, for sequences of any lengths packed into one row.

Registered with transformers as an attention implementation, it replaces cache and mask of every decoder layer: the new
keys and values are written to their slots first, then each sequence attends to all of its own. Sequences with equally
many new tokens, above all those with a single one, share one call over padded contexts. Prefill chunks share one kernel
for sequences of any lengths where there is one, on CUDA in half precision; elsewhere each chunk has a call of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PAGED = "greenroom_paged"


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's keys and values look like."""

    layers: int
    heads: int
    head_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, text_config: Any, dtype: torch.dtype) -> KVShape:
        heads = text_config.num_attention_heads
        head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
        return cls(text_config.num_hidden_layers, text_config.num_key_value_heads, head_size, dtype)

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.head_size * self.dtype.itemsize


class KVPool:
    """Keys and values of all layers, [blocks, slots of a block, heads, head size] each."""

    def __init__(self, shape: KVShape, blocks: int, block_size: int, device: torch.device) -> None:
        layer = (blocks, block_size, shape.heads, shape.head_size)
        self.keys = [torch.zeros(layer, dtype=shape.dtype, device=device) for _ in range(shape.layers)]
        self.values = [torch.zeros(layer, dtype=shape.dtype, device=device) for _ in range(shape.layers)]


@dataclass(frozen=True, slots=True)
class Prefill:
    """A chunk of one sequence.

    Attributes:
        start, end: Its rows in the packed batch.
        blocks: int64 [blocks], those of all its tokens up to the chunk's end.
        context: Number of these tokens.
        mask: [end - start, context], added to the scores; None for a first chunk, which is plainly causal.
    """

    start: int
    end: int
    blocks: torch.Tensor
    context: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PackedPrefills:
    """Chunks of several sequences for one kernel. They are the last rows of the packed batch.

    Attributes:
        start: The first one's first row.
        bounds, context_bounds: int32 [chunks + 1], where each chunk's own tokens, and all that it attends to, begin and
            the last ones end.
        context: int64 [tokens of all contexts], the slots of their keys and values.
        longest, longest_context: In tokens.
    """

    start: int
    bounds: torch.Tensor
    context_bounds: torch.Tensor
    context: torch.Tensor
    longest: int
    longest_context: int


@dataclass(frozen=True, slots=True)
class EqualChunks:
    """Sequences with equally many new tokens: one each where they decode.

    Attributes:
        tables: int64 [sequences, most blocks], what they attend to, padded with the null block.
        mask: [sequences, 1, new tokens, slots of most blocks], added to the scores: 0, or -inf for what is not seen.
    """

    tables: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, tables: torch.Tensor, seen: torch.Tensor, block_size: int, dtype: torch.dtype) -> EqualChunks:
        """`seen`: int64 [rows], sequence by sequence: so many of its sequence's tokens does each new one see."""
        beyond = torch.arange(tables.shape[1] * block_size, device=tables.device) >= seen.view(len(tables), 1, -1, 1)
        return cls(
            tables, torch.zeros(beyond.shape, dtype=dtype, device=tables.device).masked_fill_(beyond, -torch.inf)
        )

    @property
    def rows(self) -> int:
        return len(self.tables) * self.mask.shape[2]


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the packed tokens go and what they see.

    Attributes:
        slots: int64 [tokens], where their keys and values are written.
        equal: The first rows, if their sequences have equally many.
        prefills: The rows after them.
        packed: The same, in place of `prefills`.
    """

    pool: KVPool
    slots: torch.Tensor
    equal: EqualChunks | None
    prefills: tuple[Prefill, ...] = ()
    packed: PackedPrefills | None = None


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged: PagedBatch,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention.

    Args:
        query: [1, heads, tokens, head size]; key and value alike with their own number of heads.
        attention_mask: None; the batch has the masks.

    Returns:
        [1, tokens, heads, head size].
    """
    keys, values = paged.pool.keys[module.layer_idx], paged.pool.values[module.layer_idx]  # type: ignore[index]
    keys.flatten(0, 1).index_copy_(0, paged.slots, key[0].transpose(0, 1))
    values.flatten(0, 1).index_copy_(0, paged.slots, value[0].transpose(0, 1))
    parts = []
    if paged.equal is not None:
        parts.append(_attend_equal(query[0, :, : paged.equal.rows], keys, values, paged.equal, scaling))
    parts += [
        _attend_chunk(query[0, :, prefill.start : prefill.end], keys, values, prefill, scaling)
        for prefill in paged.prefills
    ]
    if paged.packed is not None:
        parts.append(_attend_packed(query[0, :, paged.packed.start :], keys, values, paged.packed, scaling))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _attend_equal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, equal: EqualChunks, scaling: float
) -> torch.Tensor:
    """[heads, rows, size] -> [rows, heads, size]. All that a group's heads ask of a sequence is one small matrix."""
    heads, _, size = query.shape
    sequences, tokens, groups = len(equal.tables), equal.mask.shape[2], heads // keys.shape[2]
    grouped = query.view(-1, groups, sequences, tokens, size).permute(2, 0, 3, 1, 4)
    out = scaled_dot_product_attention(
        grouped.reshape(sequences, -1, tokens * groups, size),
        _gather(keys, equal.tables).transpose(1, 2),
        _gather(values, equal.tables).transpose(1, 2),
        attn_mask=equal.mask if tokens == 1 else equal.mask.repeat_interleave(groups, dim=2),
        scale=scaling,
    )
    return out.view(sequences, -1, tokens, groups, size).transpose(1, 2).reshape(-1, heads, size)


def _attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prefill: Prefill, scaling: float
) -> torch.Tensor:
    """[heads, tokens, size] -> [tokens, heads, size]."""
    groups = query.shape[0] // keys.shape[2]
    own_keys, own_values = (
        _gather(cache, prefill.blocks[None])[0, : prefill.context].transpose(0, 1).repeat_interleave(groups, dim=0)
        for cache in (keys, values)
    )
    out = scaled_dot_product_attention(
        query[None],
        own_keys[None],
        own_values[None],
        attn_mask=prefill.mask,
        is_causal=prefill.mask is None,
        scale=scaling,
    )
    return out[0].transpose(0, 1)


def _attend_packed(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, packed: PackedPrefills, scaling: float
) -> torch.Tensor:
    """[heads, tokens, size] -> [tokens, heads, size]. A chunk's last token sees its whole context."""
    groups = query.shape[0] // keys.shape[2]
    own_keys, own_values = (
        cache.flatten(0, 1).index_select(0, packed.context).repeat_interleave(groups, dim=1) for cache in (keys, values)
    )
    out = varlen_attn(
        query.transpose(0, 1).contiguous(),
        own_keys,
        own_values,
        packed.bounds,
        packed.context_bounds,
        packed.longest,
        packed.longest_context,
        scale=scaling,
        window_size=(-1, 0),
    )
    return cast(torch.Tensor, out)


def _gather(cache: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """[blocks, slots of a block, heads, size] and [sequences, blocks] -> [sequences, slots, heads, size].

    Whole blocks are copied as rows: on the CPU several times as fast as token by token. On CUDA the selection of a few
    rows is several times as slow as indexing with them.
    """
    blocks = cache.flatten(1)
    rows = blocks[tables.flatten()] if cache.is_cuda else blocks.index_select(0, tables.flatten())
    return rows.view(len(tables), -1, *cache.shape[2:])


AttentionInterface.register(PAGED, paged_attention)

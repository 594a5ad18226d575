"""Decode steps as CUDA graphs: where every sequence has one new token, launching kernels costs more than running them.

Graphs are captured for numbers of sequences and lengths of context that double; a step runs in the next larger one, its
rows beyond the sequences computing on the null block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_SHORTEST_CONTEXT = 256  # tokens


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """One new token of each of n sequences.

    Attributes:
        ids: int64 [n].
        positions: int64 [rows, n].
        tables: int64 [n, blocks].
        lengths: int64 [n], tokens of each sequence, the new one included.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor


class DecodeGraphs:
    """
    Args:
        decode: Computes logits [n, vocabulary] without leaving the device.
        rows: Rows of positions.
        max_seqs: The largest number of sequences of a step.
        max_blocks: The longest table of a sequence.
        budget: Blocks of all tables of a graph together at most; beyond it steps run without a graph.
    """

    def __init__(
        self,
        decode: Callable[[DecodeInputs], torch.Tensor],
        rows: int,
        block_size: int,
        max_seqs: int,
        max_blocks: int,
        budget: int,
    ) -> None:
        self._decode = decode
        self._rows = rows
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._counts = list(_doubling(1, max_seqs))
        self._widths = list(_doubling(min(max_blocks, -(-_SHORTEST_CONTEXT // block_size)), max_blocks))
        # The largest first: the smaller ones then live in its memory.
        for count, width in itertools.product(reversed(self._counts), reversed(self._widths)):
            if count * width <= budget:
                self._graphs[count, width] = self._capture(count, width)

    def __len__(self) -> int:
        return len(self._graphs)

    def run(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        tables: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> torch.Tensor | None:
        """Logits [n, vocabulary], valid until the next call; None where no graph is large enough."""
        count = next((size for size in self._counts if size >= len(ids)), 0)
        width = next((size for size in self._widths if size >= tables.shape[1]), 0)
        graph = self._graphs.get((count, width))
        return None if graph is None else graph.run(ids, positions, tables, lengths)

    def _capture(self, count: int, width: int) -> _Graph:
        packed = torch.zeros(count, 2 + self._rows + width, dtype=torch.int64, device="cuda")
        packed[:, 1] = 1  # a row without a sequence attends to one slot of the null block: no row is without any
        inputs = DecodeInputs(packed[:, 0], packed[:, 2 : 2 + self._rows].T, packed[:, 2 + self._rows :], packed[:, 1])
        self._decode(inputs)  # what allocates or compiles on first use must not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._decode(inputs)
        return _Graph(graph, packed, logits, self._rows)


class _Graph:
    """One graph, the tensor that it reads and the one that it writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, packed: torch.Tensor, logits: torch.Tensor, rows: int) -> None:
        self._graph = graph
        self._packed = packed
        self._logits = logits
        self._rows = rows
        self._host = torch.zeros(packed.shape, dtype=packed.dtype, pin_memory=True)

    def run(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        tables: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> torch.Tensor:
        count, rows = len(ids), self._rows
        host = self._host.numpy()
        host[:] = 0
        host[:, 1] = 1
        host[:count, 0], host[:count, 1] = ids, lengths
        host[:count, 2 : 2 + rows] = positions.T
        host[:count, 2 + rows : 2 + rows + tables.shape[1]] = tables
        self._packed.copy_(self._host)
        self._graph.replay()
        return self._logits[:count]


def _doubling(first: int, last: int) -> Iterator[int]:
    """first, twice that, ..., last."""
    size = first
    while size < last:
        yield size
        size *= 2
    yield last

"""Steps as CUDA graphs: where a step has few tokens, launching kernels costs more than running them.

Such are the steps that decode, one new token of each of several sequences, and a short piece of one sequence's text: a
question about what the prefix cache holds. Graphs are captured for numbers of sequences, of tokens and of blocks that
double; a step runs in the next larger one, where rows beyond its own write to the null block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.blocks import NULL_BLOCK

_SHORTEST_CONTEXT = 256  # tokens
_SHORTEST_PIECE, _LONGEST_PIECE = 16, 128  # tokens


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Equally many new tokens of each of some sequences, sequence by sequence: n in all.

    Attributes:
        ids: int64 [n].
        slots: int64 [n], where their keys and values are written.
        seen: int64 [n], tokens of its sequence that each one sees, itself included.
        positions: int64 [rows, n].
        tables: int64 [sequences, blocks].
    """

    ids: torch.Tensor
    slots: torch.Tensor
    seen: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Shape:
    sequences: int
    tokens: int  # new ones of each
    width: int  # blocks of a table


class StepGraphs:
    """
    Args:
        step: Computes logits [n, vocabulary] without leaving the device.
        rows: Rows of positions.
        max_seqs: The largest number of sequences of a step.
        max_blocks: The longest table of a sequence.
        budget: Blocks of all tables of a graph together at most; beyond it steps run without a graph.
    """

    def __init__(
        self,
        step: Callable[[StepInputs], torch.Tensor],
        rows: int,
        block_size: int,
        max_seqs: int,
        max_blocks: int,
        budget: int,
    ) -> None:
        self._step = step
        self._rows = rows
        self._pool = torch.cuda.graph_pool_handle()
        self._counts = list(_doubling(1, max_seqs))
        self._pieces = list(_doubling(_SHORTEST_PIECE, _LONGEST_PIECE))
        self._widths = list(_doubling(min(max_blocks, -(-_SHORTEST_CONTEXT // block_size)), max_blocks))
        # The largest first: the smaller ones then live in its memory.
        shapes = [shape for shape in self._shapes() if shape.sequences * shape.width <= budget]
        shapes.sort(key=lambda shape: shape.sequences * shape.tokens * shape.width, reverse=True)
        self._graphs = {shape: self._capture(shape) for shape in shapes}

    def __len__(self) -> int:
        return len(self._graphs)

    def run(
        self,
        ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        seen: NDArray[np.int64],
        positions: NDArray[np.int64],
        tables: NDArray[np.int64],
    ) -> torch.Tensor | None:
        """Logits [n, vocabulary], valid until the next call; None where no graph is large enough. See `StepInputs`."""
        sequences, width = tables.shape
        several = len(ids) > sequences
        shape = _Shape(
            _next(self._counts, sequences),
            _next(self._pieces, len(ids)) if several else 1,
            _next(self._widths, width),
        )
        graph = self._graphs.get(shape)
        return None if graph is None else graph.run(ids, slots, seen, positions, tables)

    def _shapes(self) -> Iterator[_Shape]:
        for width in self._widths:
            yield from (_Shape(count, 1, width) for count in self._counts)
            yield from (_Shape(1, tokens, width) for tokens in self._pieces)

    def _capture(self, shape: _Shape) -> _Graph:
        buffers = _Buffers(shape, self._rows)
        self._step(buffers.inputs)  # what allocates or compiles on first use must not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(buffers.inputs)
        return _Graph(graph, buffers, logits)


class _Buffers:
    """What a graph reads: one tensor on the device, filled by one copy."""

    def __init__(self, shape: _Shape, rows: int) -> None:
        count = shape.sequences * shape.tokens
        sizes = [count, count, count, rows * count, shape.sequences * shape.width]
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=True)
        self._device = torch.zeros_like(self._host, device="cuda")
        ids, slots, seen, positions, tables = torch.split(self._device, sizes)
        seen.fill_(1)
        self.inputs = StepInputs(ids, slots, seen, positions.view(rows, count), tables.view(-1, shape.width))
        parts = [part.numpy() for part in torch.split(self._host, sizes)]
        self._ids, self._slots, self._seen = parts[:3]
        self._positions, self._tables = parts[3].reshape(rows, count), parts[4].reshape(-1, shape.width)

    def fill(
        self,
        ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        seen: NDArray[np.int64],
        positions: NDArray[np.int64],
        tables: NDArray[np.int64],
    ) -> None:
        count, (sequences, width) = len(ids), tables.shape
        # A row without a token writes to the null block, and sees one token: no row may see none.
        self._slots[:], self._seen[:], self._tables[:] = NULL_BLOCK, 1, NULL_BLOCK
        self._ids[:count], self._slots[:count], self._seen[:count] = ids, slots, seen
        self._positions[:, :count] = positions
        self._tables[:sequences, :width] = tables
        self._device.copy_(self._host)


class _Graph:
    """One graph, what it reads and the tensor that it writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, buffers: _Buffers, logits: torch.Tensor) -> None:
        self._graph = graph
        self._buffers = buffers
        self._logits = logits

    def run(self, ids: NDArray[np.int64], *inputs: NDArray[np.int64]) -> torch.Tensor:
        self._buffers.fill(ids, *inputs)
        self._graph.replay()
        return self._logits[: len(ids)]


def _next(sizes: list[int], size: int) -> int:
    """The smallest that is large enough, or 0."""
    return next((each for each in sizes if each >= size), 0)


def _doubling(first: int, last: int) -> Iterator[int]:
    """first, twice that, ..., last."""
    size = first
    while size < last:
        yield size
        size *= 2
    yield last

"""Which tokens of a placeholder range carry embeddings, on the wire: runs of them, [start, length] from the range's
own start, ascending and apart. None: all do.

vLLM's protocol lacks it, so its engine cannot run the features of families whose ranges hold other tokens too (row
breaks, tile names, newlines). It ignores the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn

from renderer.errors import RequestError


def embed_runs(mask: Sequence[bool] | None) -> list[list[int]] | None:
    """The runs of a mask; None where it leaves nothing out."""
    if mask is None or all(mask):
        return None
    runs, start = [], 0
    for carries, group in groupby(mask):
        length = len(list(group))
        if carries:
            runs.append([start, length])
        start += length
    return runs


def embed_mask(runs: Any, length: int) -> tuple[bool, ...] | None:
    """The mask of runs that came over the wire.

    Args:
        runs: What stands in the JSON.
        length: Tokens of the range; no more than these are allocated.

    Raises:
        RequestError: They are not what `embed_runs` writes of a mask of this length.
    """
    if runs is None:
        return None
    if not isinstance(runs, list) or not runs:
        _refuse("must be null or a list of runs")
    mask: list[bool] = []
    for run in runs:
        if not isinstance(run, list) or len(run) != 2 or any(type(number) is not int for number in run):
            _refuse("must hold runs of a start and a length")
        start, size = run
        if size < 1 or start < len(mask) + bool(mask) or start + size > length:
            _refuse(f"must hold runs that ascend, keep apart and lie within the {length} tokens of their range")
        mask += [False] * (start - len(mask)) + [True] * size
    if len(mask) == length and all(mask):
        _refuse("must be null where every token carries an embedding")
    return (*mask, *[False] * (length - len(mask)))


def _refuse(reason: str) -> NoReturn:
    raise RequestError(f"features.mm_embed_runs: an item's entry {reason}", "features")

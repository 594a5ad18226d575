"""Tensors of items that arrived processed, against what a family's own processor makes.

An engine trusts its input: a tensor that it did not expect can end it for everybody. What fails here goes no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from renderer.prompt import Tensors

FLOATS = ("float32", "float16")
RAW_OR_FLOATS = ("uint8", *FLOATS)
# Normalised pixels lie within a few units of 0. Numbers far beyond, or none at all, spread through sums and masks to
# whoever shares memory with them.
LARGEST_PIXEL = 1e4
# No image has more pixels on a side, and products of two sides stay far from overflow.
LONGEST_SIDE = 1 << 20


def checked_tensor(
    tensors: Tensors, name: str, shape: Sequence[int | None], dtypes: Sequence[str] = ("int64",)
) -> NDArray[Any]:
    """One tensor of an item.

    Args:
        shape: What it should be; None for a size that depends on the image, which is at least 1.

    Raises:
        ValueError: It has another shape or dtype.
    """
    array = tensors[name]
    fits = len(array.shape) == len(shape) and all(map(_fits, array.shape, shape))
    if not fits or array.dtype.name not in dtypes:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ValueError(
            f"{name} should be {' or '.join(dtypes)} {wanted}, it is {array.dtype.name} {list(array.shape)}"
        )
    return array


def checked_pixels(tensors: Tensors, shape: Sequence[int | None], dtypes: Sequence[str] = FLOATS) -> NDArray[Any]:
    """An item's `pixel_values`.

    Raises:
        ValueError: They have another shape or dtype, or hold what is no pixel.
    """
    values = checked_tensor(tensors, "pixel_values", shape, dtypes)
    if values.dtype.kind == "f" and not (values.min() >= -LARGEST_PIXEL and values.max() <= LARGEST_PIXEL):
        raise ValueError(f"pixel_values should be numbers within {LARGEST_PIXEL:.0f} of 0")
    return values


def check_number(tensors: Tensors, name: str, value: int) -> None:
    """Raises ValueError unless a tensor is this one number."""
    if int(checked_tensor(tensors, name, ())) != value:
        raise ValueError(f"{name} should be {value}, it is {int(tensors[name])}")


def checked_sides(tensors: Tensors, name: str, multiple: int = 1) -> tuple[int, ...]:
    """The sizes in a tensor of two or three.

    Raises:
        ValueError: One is not a multiple within bounds.
    """
    values = tuple(int(value) for value in tensors[name])
    if any(not 0 < value <= LONGEST_SIDE or value % multiple for value in values[-2:]):
        raise ValueError(f"{name} should end with two multiples of {multiple} up to {LONGEST_SIDE}, it is {values}")
    return values


def has_empty(tiles: NDArray[Any]) -> bool:
    """Whether a tile holds zeros alone, which models take for padding."""
    return not np.logical_or.reduce(tiles.reshape(len(tiles), -1), axis=1).all()


def _fits(size: int, wanted: int | None) -> bool:
    return size >= 1 if wanted is None else size == wanted

"""Sizes of images and grids: arithmetic alone, no pixels."""

from __future__ import annotations

import math

from renderer.prompt import ImageSize

MAX_ASPECT_RATIO = 200


def smart_resize(size: ImageSize, factor: int, min_pixels: int, max_pixels: int) -> ImageSize:
    """Size near the given one, of the same shape, in multiples of `factor`, within the bounds of pixels.

    The formula of Qwen2-VL's image processor. The bounds give way where a side would fall below `factor`.

    Raises:
        ValueError: One side is more than 200 times the other.
    """
    height, width = size.height, size.width
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(f"its sides are in a ratio of {ratio:.0f}, more than {MAX_ASPECT_RATIO}")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return ImageSize(columns * factor, rows * factor)

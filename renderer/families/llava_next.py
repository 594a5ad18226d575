"""LLaVA-NeXT and LLaVA-OneVision: the whole image as one square, and again in tiles of a grid that fits its shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import ConfigError
from renderer.families.base import ProcessedImages, image_placeholder, largest
from renderer.families.checks import checked_pixels, checked_sides, checked_tensor
from renderer.families.hf_processor import ImageProcessor
from renderer.families.llava import vision_tokens
from renderer.family import Family, Field, Placeholder
from renderer.pixels import Pixels
from renderer.placeholders import Replacement
from renderer.prompt import ImageSize, Tensors

# Beyond this many times the tiles allowed, LLaVA-OneVision shrinks the grid of features.
_SHRINK_ABOVE = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaNext(ProcessedImages):
    """`pixel_values` float32 [1 + tiles, 3, side, side], `image_sizes` int64 [2]: height and width of the image.

    Attributes:
        side: Of a tile, in pixels.
        patches: On a side of a tile.
        base_tokens: Of the whole image as one square.
        grids: Height and width of every grid of tiles, in pixels.
        max_tiles: So many tiles' features are kept at most; None: all of them.
    """

    placeholder: Placeholder
    fields: ClassVar[Mapping[str, Field]] = {
        "pixel_values": Field("batched"),
        "image_sizes": Field("batched", keep_on_cpu=True),
    }

    side: int
    patches: int
    base_tokens: int
    grids: tuple[tuple[int, int], ...]
    max_tiles: int | None

    def replacement(self, size: ImageSize) -> Replacement:
        return Replacement((self.placeholder.token_id,) * self._tokens(size))

    def tensors(self, pixels: Pixels) -> Tensors:
        output = self.processor(pixels)
        return {
            "pixel_values": np.ascontiguousarray(output["pixel_values"][0]),
            "image_sizes": np.array(pixels.shape[:2], np.int64),
        }

    def embeds(self, tensors: Tensors) -> int:
        """More tiles than the image has may follow, of zeros: vLLM fills up what it processes together."""
        checked_tensor(tensors, "image_sizes", (2,))
        height, width = checked_sides(tensors, "image_sizes")
        rows, columns = select_best_resolution((height, width), self.grids)
        tiles = 1 + rows // self.side * (columns // self.side)
        values = checked_pixels(tensors, (None, 3, self.side, self.side))
        if len(values) < tiles or values[tiles:].any():
            raise ValueError(f"pixel_values should have {tiles} tiles for an image of {height} by {width} pixels")
        return self._tokens(ImageSize(width, height))

    def largest_image(self, max_tokens: int) -> ImageSize:
        sizes = (ImageSize(width, height) for height, width in self.grids)
        return largest(((self._tokens(size), size) for size in sizes), max_tokens)

    def _tokens(self, size: ImageSize) -> int:
        """Tokens of the square, then the tiles' rows without what only pads, each row with a newline at its end."""
        height, width = select_best_resolution((size.height, size.width), self.grids)
        grid = (height // self.side * self.patches, width // self.side * self.patches)
        rows, columns = unpadded(size, *grid)
        if self.max_tiles is not None:
            rows, columns = shrunk(rows, columns, self.max_tiles * self.patches**2)
        return self.base_tokens + rows * (columns + 1)


def unpadded(size: ImageSize, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a grid of features that are not padding: the image keeps its shape in the middle of it.

    The formula of LLaVA-NeXT's `unpad_image`.
    """
    if size.width / size.height > columns / rows:
        kept = int(round(size.height * (columns / size.width), 7))
        return rows - (rows - kept) // 2 * 2, columns
    kept = int(round(size.width * (rows / size.height), 7))
    return rows, columns - (columns - kept) // 2 * 2


def shrunk(rows: int, columns: int, most: int) -> tuple[int, int]:
    """Rows and columns after interpolation to about `most` features, where there are clearly more.

    The formula of LLaVA-OneVision's "anyres_max".
    """
    excess = math.sqrt(rows * columns / most)
    return (int(rows // excess), int(columns // excess)) if excess > _SHRINK_ABOVE else (rows, columns)


def build(checkpoint: Checkpoint, config: RendererConfig) -> Family:
    """The family of a LLaVA-NeXT or LLaVA-OneVision checkpoint.

    Raises:
        ConfigError: Its vision tower is not known, or `mm_processor_kwargs` holds something unknown.
    """
    hf, vision = checkpoint.config, checkpoint.config.vision_config
    video_id = getattr(hf, "video_token_id", None)
    return LlavaNext(
        name=checkpoint.model_type,
        placeholder=image_placeholder(checkpoint),
        embed_id=hf.image_token_id,
        reserved_ids=frozenset() if video_id is None else frozenset({video_id}),
        processor=ImageProcessor.load(checkpoint, config),
        side=vision.image_size,
        patches=vision.image_size // vision.patch_size,
        base_tokens=vision_tokens(hf),
        grids=_grids(hf.image_grid_pinpoints),
        max_tiles=_max_tiles(hf),
    )


def _grids(pinpoints: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in pinpoints)


def _max_tiles(config: Any) -> int | None:
    """The number at the end of LLaVA-OneVision's `anyres_max_9`."""
    setting = getattr(config, "vision_aspect_ratio", None)
    if setting is None:
        return None
    head, _, number = setting.rpartition("_")
    if head != "anyres_max" or not number.isdecimal():
        raise ConfigError(f"vision_aspect_ratio {setting!r} is not known")
    return int(number)

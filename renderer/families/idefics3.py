"""Idefics3 and SmolVLM: an image in square tiles, row by row, and once more as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import ConfigError
from renderer.families.base import ProcessedImages, image_placeholder, largest, masked
from renderer.families.checks import check_number, checked_pixels, checked_tensor, has_empty
from renderer.families.hf_processor import ImageProcessor, is_flag, longest_edge
from renderer.family import Family, Field
from renderer.pixels import Pixels, normalised, resized
from renderer.placeholders import Replacement
from renderer.prompt import ImageSize, Tensors

_MAX_EDGE = 4096
_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Idefics3(ProcessedImages):
    """`pixel_values` float32 [tiles, 3, side, side], `pixel_attention_mask` int64 [tiles, side, side] of ones,
    `num_patches` int64 []: the tiles.

    Attributes:
        side: Of a tile, in pixels.
        tile_tokens: Of one tile, those that carry embeddings.
        text_of: Tokens of an image of so many rows and columns of tiles; of (0, 0) where it is not split.
        masks: Of so many tiles.
        written_out: Whether the tiles are cut here, without Hugging Face's class.
    """

    fields: ClassVar[Mapping[str, Field]] = {
        "pixel_values": Field("flat"),
        "pixel_attention_mask": Field("flat"),
        "num_patches": Field("batched", keep_on_cpu=True),
    }

    side: int
    tile_tokens: int
    text_of: Callable[[int, int], Replacement]
    masks: Masks
    written_out: bool

    def replacement(self, size: ImageSize) -> Replacement:
        return self.text_of(*self._grid(size))

    def tensors(self, pixels: Pixels) -> Tensors:
        values = self._values(pixels) if self.written_out else self.processor(pixels)["pixel_values"][0]
        return {
            "pixel_values": values,
            "pixel_attention_mask": self.masks.of(len(values)),
            "num_patches": np.array(len(values), np.int64),
        }

    def embeds(self, tensors: Tensors) -> int:
        values = checked_pixels(tensors, (None, 3, self.side, self.side))
        count = len(values)
        mask = checked_tensor(tensors, "pixel_attention_mask", (count, self.side, self.side), ("int64", "bool"))
        check_number(tensors, "num_patches", count)
        if not 0 <= mask.min() <= mask.max() <= 1 or has_empty(mask) or has_empty(values):
            raise ValueError("pixel_attention_mask should be of zeros and ones, and no tile empty")
        return count * self.tile_tokens

    def largest_image(self, max_tokens: int) -> ImageSize:
        edge = int(self.processor.hf.size.longest_edge)
        sizes = [ImageSize(edge, max(1, edge * part // 8)) for part in range(1, 9)]
        return largest(((len(self.replacement(size).token_ids), size) for size in sizes), max_tokens)

    def _grid(self, size: ImageSize) -> tuple[int, int]:
        hf = self.processor.hf
        return tiles(size, hf.size.longest_edge, self.side) if hf.do_image_splitting else (0, 0)

    def _values(self, pixels: Pixels) -> NDArray[np.float32]:
        """The tensor of Hugging Face's torchvision class, which copies the pixels several times more."""
        hf = self.processor.hf
        return normalised(self._cut(pixels), hf.image_mean, hf.image_std, 1 / hf.rescale_factor)

    def _cut(self, pixels: Pixels) -> list[Pixels]:
        """The tiles, row by row, and the whole image as one more; that alone where it is not split."""
        hf, side = self.processor.hf, self.side
        height, width = pixels.shape[:2]
        rows, columns = self._grid(ImageSize(width, height))
        resample = Image.Resampling(hf.resample)
        large = ImageSize(*_shrunk(*_enlarged(width, height, hf.size.longest_edge)))
        whole = ImageSize(side * (columns or 1), side * (rows or 1))
        for size in (large, whole):
            pixels = resized(pixels, size, resample, "torchvision")
        if not rows:
            return [pixels]
        corners = [(row * side, column * side) for row in range(rows) for column in range(columns)]
        cut = [pixels[top : top + side, left : left + side] for top, left in corners]
        return [*cut, resized(pixels, ImageSize(side, side), resample, "torchvision")]


class Masks:
    """Masks of tiles of which every pixel counts: views of one block, as long as the longest that was asked for.

    Thread-safe: two threads that both need a longer block each have theirs.
    """

    def __init__(self, side: int) -> None:
        self._block = np.ones((0, side, side), np.int64)

    def of(self, tiles: int) -> NDArray[np.int64]:
        """int64 [tiles, side, side], read-only."""
        block = self._block
        if len(block) < tiles:
            block = np.ones((tiles, *block.shape[1:]), np.int64)
            block.flags.writeable = False
            self._block = block
        return block[:tiles]


def tiles(size: ImageSize, longest: int, side: int) -> tuple[int, int]:
    """Rows and columns of tiles of an image; (0, 0) where one tile holds it.

    The image is resized to have its longer side of `longest` pixels, and again to multiples of the tile: the formulas
    of Idefics3's image processor, as its pixels follow them.
    """
    width, height = _enlarged(size.width, size.height, longest)
    width, height = _shrunk(width, height)
    shape = width / height
    if width >= height:
        columns = math.ceil(width / side)
        rows = math.ceil(int(columns * side / shape) / side)
    else:
        rows = math.ceil(height / side)
        columns = math.ceil(int(rows * side * shape) / side)
    return (rows, columns) if rows > 1 or columns > 1 else (0, 0)


def _enlarged(width: int, height: int, longest: int) -> tuple[int, int]:
    """The longer side becomes `longest`, the other one keeps the shape and becomes even."""
    shape = width / height
    if width >= height:
        other = int(longest / shape)
        return longest, max(1, other + other % 2)
    other = int(longest * shape)
    return max(1, other + other % 2), longest


def _shrunk(width: int, height: int) -> tuple[int, int]:
    """No side is beyond the 4096 pixels of the processor."""
    shape = width / height
    if width >= height and width > _MAX_EDGE:
        return _MAX_EDGE, max(1, int(_MAX_EDGE / shape))
    if height > width and height > _MAX_EDGE:
        return max(1, int(_MAX_EDGE * shape)), _MAX_EDGE
    return width, height


def build(checkpoint: Checkpoint, config: RendererConfig) -> Family:
    """The family of an Idefics3 or SmolVLM checkpoint.

    Raises:
        ConfigError: The tokenizer lacks a token, `mm_processor_kwargs` holds something unknown, or the processor cuts
            other tiles than the model sees.
    """
    side = checkpoint.config.vision_config.image_size
    options = {"do_image_splitting": is_flag, "size": longest_edge(side, _MAX_EDGE)}
    processor = ImageProcessor.load(checkpoint, config, options)
    if processor.hf.max_image_size["longest_edge"] != side:
        raise ConfigError(f"max_image_size {processor.hf.max_image_size} is not the vision tower's {side} pixels")
    return Idefics3(
        name=checkpoint.model_type,
        placeholder=image_placeholder(checkpoint),
        embed_id=checkpoint.config.image_token_id,
        processor=processor,
        side=side,
        tile_tokens=_tile_tokens(checkpoint),
        text_of=_texts(checkpoint),
        masks=Masks(side),
        written_out=config.image_backend == "torchvision" and _is_usual(processor.hf),
    )


def _is_usual(hf: Any) -> bool:
    """Whether nothing that the processor does to pixels is switched off."""
    return bool(hf.do_resize and hf.do_rescale and hf.do_normalize and hf.do_pad)


def _texts(checkpoint: Checkpoint) -> Callable[[int, int], Replacement]:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    tile = tokenizer.pieces([config.image_token_id])[0] * _tile_tokens(checkpoint)
    tokenizer.id_of(_FAKE)

    @lru_cache(maxsize=512)
    def text_of(rows: int, columns: int) -> Replacement:
        lines = ["".join(f"{_FAKE}<row_{row}_col_{column}>{tile}" for column in _to(columns)) for row in _to(rows)]
        split = "".join(f"{line}\n" for line in lines) + "\n" if lines else ""
        text = f"{split}{_FAKE}{_GLOBAL}{tile}{_FAKE}"
        return masked(tokenizer.encode(text, add_special_tokens=False), config.image_token_id)

    return text_of


def _tile_tokens(checkpoint: Checkpoint) -> int:
    vision = checkpoint.config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2 // checkpoint.config.scale_factor**2)


def _to(count: int) -> range:
    return range(1, count + 1)

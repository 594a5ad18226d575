"""InternVL in Hugging Face's form: an image in square tiles of a grid that fits its shape, then once as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.families.base import ProcessedImages, image_placeholder, largest, masked
from renderer.families.checks import check_number, checked_pixels
from renderer.families.hf_processor import ImageProcessor, is_flag, whole
from renderer.family import Family, Field, Placeholder
from renderer.pixels import Pixels
from renderer.placeholders import Replacement
from renderer.prompt import ImageSize, Tensors

_MAX_TILES = 64
_OPTIONS = {"crop_to_patches": is_flag, "min_patches": whole(1, _MAX_TILES), "max_patches": whole(1, _MAX_TILES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVL(ProcessedImages):
    """`pixel_values` float32 [tiles, 3, side, side], `image_num_patches` int64 []: the tiles, `image_token_id` int64.

    Attributes:
        tile_tokens: Of one tile.
        begin_id, end_id: Tokens around an image.
    """

    placeholder: Placeholder
    fields: ClassVar[Mapping[str, Field]] = {
        "pixel_values": Field("flat"),
        "image_num_patches": Field("batched", keep_on_cpu=True),
        "image_token_id": Field("shared", keep_on_cpu=True),
    }

    tile_tokens: int
    begin_id: int
    end_id: int

    def replacement(self, size: ImageSize) -> Replacement:
        return _framed(self.begin_id, self.placeholder.token_id, self.end_id, self.tile_tokens * self._tiles(size))

    def tensors(self, pixels: Pixels) -> Tensors:
        tiles = np.stack(self.processor(pixels)["pixel_values"])
        return {
            "pixel_values": tiles,
            "image_num_patches": np.array(len(tiles), np.int64),
            "image_token_id": np.array(self.placeholder.token_id, np.int64),
        }

    def embeds(self, tensors: Tensors) -> int:
        size = self.processor.hf.size
        count = len(checked_pixels(tensors, (None, 3, int(size.height), int(size.width))))
        check_number(tensors, "image_num_patches", count)
        check_number(tensors, "image_token_id", self.placeholder.token_id)
        return count * self.tile_tokens

    def largest_image(self, max_tokens: int) -> ImageSize:
        side = int(self.processor.hf.size.height)
        sizes = [ImageSize(side * columns, side) for columns in range(1, self.processor.hf.max_patches + 1)]
        return largest(((self._tiles(size) * self.tile_tokens + 2, size) for size in sizes), max_tokens)

    def _tiles(self, size: ImageSize) -> int:
        """Tiles of the grid and, where that has more than one, the whole image."""
        hf = self.processor.hf
        if not hf.crop_to_patches:
            return 1
        side = (hf.size.height, hf.size.width)
        columns, rows = get_optimal_tiled_canvas((size.height, size.width), side, hf.min_patches, hf.max_patches)
        tiles = int(columns * rows)
        return tiles + 1 if tiles > 1 else tiles


@lru_cache(maxsize=128)
def _framed(begin_id: int, context_id: int, end_id: int, tokens: int) -> Replacement:
    return masked((begin_id, *(context_id,) * tokens, end_id), context_id)


def build(checkpoint: Checkpoint, config: RendererConfig) -> Family:
    """The family of an InternVL checkpoint.

    Raises:
        ConfigError: The tokenizer lacks a token, or `mm_processor_kwargs` holds something unknown.
    """
    tokenizer = checkpoint.tokenizer
    return InternVL(
        name=checkpoint.model_type,
        placeholder=image_placeholder(checkpoint),
        embed_id=checkpoint.config.image_token_id,
        reserved_ids=frozenset({tokenizer.id_of(tokenizer.hf.video_token)}),
        # Hugging Face's processor of InternVL cuts into tiles whatever `preprocessor_config.json` says.
        processor=ImageProcessor.load(checkpoint, config, _OPTIONS, {"crop_to_patches": True}),
        tile_tokens=checkpoint.config.image_seq_length,
        begin_id=tokenizer.id_of(tokenizer.hf.start_image_token),
        end_id=tokenizer.id_of(tokenizer.hf.end_image_token),
    )

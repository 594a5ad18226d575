"""Families whose encoder reads square pictures of one size: LLaVA 1.5 (one an image), Idefics3 and SmolVLM (tiles)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.families.base import ImageFamily, check_pixels, take
from renderer.errors import ConfigError, RequestError
from renderer.families import idefics3
from renderer.prompt import ImageSize, Tensors

# Tokens of the vision tower that stand for no patch.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


class Llava(ImageFamily):
    """`pixel_values` uint8 (raw) or float [3, side, side]."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        if self.vision.model_type not in _CLASS_TOKENS:
            raise ConfigError(f"LLaVA runs with {sorted(_CLASS_TOKENS)}, the checkpoint has {self.vision.model_type}")

    @property
    def largest_item(self) -> int:
        patches = int(self.vision.image_size // self.vision.patch_size) ** 2
        dropped = int(self.model.config.vision_feature_select_strategy == "default")
        return patches + _CLASS_TOKENS[self.vision.model_type] - dropped

    def example(self, embeds: int) -> Tensors:
        return {"pixel_values": np.zeros((3, self.vision.image_size, self.vision.image_size), dtype=np.uint8)}

    def check(self, tensors: Tensors) -> int:
        (pixels,) = take(tensors, ("pixel_values",))
        check_pixels(pixels, (3, self.vision.image_size, self.vision.image_size))
        return self.largest_item

    def encode(self, items: Sequence[Tensors]) -> list[torch.Tensor]:
        pictures = torch.stack(self.pixels(items, channel_axis=0))
        return list(self.model.model.get_image_features(pictures).pooler_output)


class Idefics3(ImageFamily):
    """`pixel_values` uint8 (raw) or float [tiles, 3, side, side], `pixel_attention_mask` [tiles, side, side]."""

    @property
    def largest_item(self) -> int:
        if not self.processor.do_image_splitting:
            return self._tile_embeds
        longest, side = (size["longest_edge"] for size in (self.processor.size, self.processor.max_image_size))
        rows, columns = idefics3.tiles(ImageSize(longest, longest), longest, side)
        return (rows * columns + 1) * self._tile_embeds

    def example(self, embeds: int) -> Tensors:
        side, tiles = self.vision.image_size, max(1, embeds // self._tile_embeds)
        return {
            "pixel_values": np.zeros((tiles, 3, side, side), dtype=np.uint8),
            "pixel_attention_mask": np.ones((tiles, side, side), dtype=np.int64),
        }

    def check(self, tensors: Tensors) -> int:
        pixels, mask = take(tensors, ("pixel_values", "pixel_attention_mask"), optional=("num_patches",))
        tiles, side = len(pixels) if pixels.ndim else 0, self.vision.image_size
        check_pixels(pixels, (tiles, 3, side, side))
        if mask.shape != (tiles, side, side) or mask.dtype.kind not in "biu":
            raise RequestError(f"pixel_attention_mask must be integers {[tiles, side, side]}, got {list(mask.shape)}")
        if not tiles or (pixels.dtype != np.uint8 and not pixels.reshape(tiles, -1).any(axis=1).all()):
            raise RequestError("pixel_values has a tile of zeros, which the model takes for padding")
        return tiles * self._tile_embeds

    def encode(self, items: Sequence[Tensors]) -> list[torch.Tensor]:
        tiles = torch.cat(self.pixels(items, channel_axis=1))
        masks = torch.cat([self.to_device(np.asarray(item["pixel_attention_mask"], dtype=bool)) for item in items])
        output = self.model.model.get_image_features(tiles[None], masks[None]).pooler_output
        counts = [len(item["pixel_values"]) for item in items]
        return [part.flatten(0, 1) for part in output.split(counts)]

    @property
    def _tile_embeds(self) -> int:
        return int((self.vision.image_size // self.vision.patch_size) ** 2 // self.model.config.scale_factor**2)

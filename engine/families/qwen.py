"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size as rows of patches, three rotary positions a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.families.base import ImageFamily, PlacedItem, check_pixels, take
from renderer.errors import RequestError
from renderer.prompt import Tensors

_LONGEST_SIDE = 1 << 20  # patches; no image has more, and products of two sides stay far from overflow


class QwenVL(ImageFamily):
    """`pixel_values` uint8 (raw) or float [patches, channels * time * patch * patch], `image_grid_thw` int64 [3]."""

    position_rows = 3

    @property
    def largest_item(self) -> int:
        return int(self.processor.size["longest_edge"] // (self.vision.patch_size * self._merge) ** 2)

    def example(self, embeds: int) -> Tensors:
        rows = max(1, int(embeds**0.5))
        grid = np.array([1, rows * self._merge, max(1, embeds // rows) * self._merge], dtype=np.int64)
        return {
            "pixel_values": np.zeros((int(grid.prod()), self._columns), dtype=np.uint8),
            "image_grid_thw": grid,
        }

    def check(self, tensors: Tensors) -> int:
        pixels, grid = take(tensors, ("pixel_values", "image_grid_thw"))
        if grid.shape != (3,) or grid.dtype != np.int64:
            raise RequestError(f"image_grid_thw must be int64 [3], got {grid.dtype} {list(grid.shape)}")
        times, height, width = (int(side) for side in grid)
        sides_fit = all(0 < side <= _LONGEST_SIDE and side % self._merge == 0 for side in (height, width))
        if times != 1 or not sides_fit:
            raise RequestError(f"image_grid_thw must be 1 and two multiples of {self._merge}, got {grid.tolist()}")
        check_pixels(pixels, (height * width, self._columns))
        return height * width // self._merge**2

    def encode(self, items: Sequence[Tensors]) -> list[torch.Tensor]:
        channels = len(self.pixel_format.mean)
        by_channel = [
            {"pixel_values": item["pixel_values"].reshape(-1, channels, self._columns // channels)} for item in items
        ]
        patches = torch.cat(self.pixels(by_channel, channel_axis=1)).flatten(1)
        return self._features(patches, self.to_device(np.stack([item["image_grid_thw"] for item in items])))

    def positions(self, token_ids: NDArray[np.int32], items: Sequence[PlacedItem]) -> tuple[NDArray[np.int64], int]:
        if not items:
            return np.broadcast_to(np.arange(len(token_ids), dtype=np.int64), (3, len(token_ids))), 0
        kinds = torch.zeros(1, len(token_ids), dtype=torch.int32)
        for place, _ in items:
            kinds[0, place.offset : place.end] = 1 if place.embed_mask is None else torch.tensor(place.embed_mask)
        positions, deltas = self.model.model.get_rope_index(
            torch.from_numpy(token_ids).long()[None],
            mm_token_type_ids=kinds,
            image_grid_thw=torch.from_numpy(np.stack([tensors["image_grid_thw"] for _, tensors in items])),
        )
        return positions[:, 0].numpy(), int(deltas.item())

    def _features(self, patches: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
        return list(self.model.model.get_image_features(patches, grids).pooler_output)

    @property
    def _merge(self) -> int:
        return int(self.vision.spatial_merge_size)

    @property
    def _columns(self) -> int:
        """Values of a patch."""
        return len(self.pixel_format.mean) * int(self.vision.temporal_patch_size * self.vision.patch_size**2)


class Qwen3VL(QwenVL):
    """Its encoder gives embeddings for the first decoder layers too ("deepstack"); they follow the hidden size."""

    def decoder_inputs(self, visual: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
        levels = features.chunk(len(self.vision.deepstack_visual_indexes), dim=-1)
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": list(levels)}

    def _features(self, patches: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
        output = self.model.model.get_image_features(patches, grids)
        levels = [output.pooler_output, *output.deepstack_features]
        return [torch.cat(parts, dim=-1) for parts in zip(*levels, strict=True)]

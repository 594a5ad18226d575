"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size as rows of patches, three rotary positions a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.families.base import ImageFamily, PlacedItem, check_pixels, take
from engine.varlen import VARLEN
from renderer.errors import RequestError
from renderer.prompt import PlaceholderRange, Tensors

_LONGEST_SIDE = 1 << 20  # patches; no image has more, and products of two sides stay far from overflow


class QwenVL(ImageFamily):
    """`pixel_values` uint8 (raw) or float [patches, channels * time * patch * patch], `image_grid_thw` int64 [3]."""

    position_rows = 3

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        if self._device.type == "cuda" and self._dtype in (torch.float16, torch.bfloat16):
            model.get_encoder("image").config._attn_implementation = VARLEN

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
        """Multimodal rotary positions, as `get_rope_index` gives them, for adjacent images too.

        Text advances all three rows together. An image's tokens share one time and lie on its rows and columns; what
        follows goes on after its longer side (Qwen2-VL report, section 2.1).
        """
        runs: list[NDArray[np.int64]] = []
        done, position = 0, 0
        for place, tensors in items:
            start = place.offset + _first_embed(place)
            runs.append(_line(position, start - done))
            position += start - done
            rows, columns = (int(side) // self._merge for side in tensors["image_grid_thw"][1:])
            runs.append(np.indices((1, rows, columns)).reshape(3, -1) + position)
            position += max(rows, columns)
            done = start + rows * columns
        runs.append(_line(position, len(token_ids) - done))
        return np.concatenate(runs, axis=1), position - done

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


def _line(start: int, count: int) -> NDArray[np.int64]:
    """Positions of a run of text: int64 [3, count]."""
    return np.broadcast_to(np.arange(start, start + count, dtype=np.int64), (3, count))


def _first_embed(place: PlaceholderRange) -> int:
    """Where in its range an image's embeddings begin.

    Raises:
        RequestError: They do not stand side by side, so they lie on no grid.
    """
    carriers = np.flatnonzero(np.ones(place.length) if place.embed_mask is None else place.embed_mask)
    if carriers[-1] - carriers[0] + 1 != len(carriers):
        raise RequestError("the embeddings of an image must stand side by side")
    return int(carriers[0])

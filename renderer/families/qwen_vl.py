"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, cut into patches, normalised by the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import ConfigError, RequestError
from renderer.families.base import ImageFamily
from renderer.families.checks import RAW_OR_FLOATS, checked_pixels, checked_sides, checked_tensor
from renderer.family import Family, Field, Placeholder
from renderer.pixels import Backend, Pixels, patches, resize
from renderer.placeholders import Replacement
from renderer.prompt import ImageSize, Tensors
from renderer.resize import smart_resize


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenVL(ImageFamily):
    """An image is resized to multiples of patch * merge pixels and cut into patches; merge**2 of them make a token.

    The tensors are uint8, before rescaling and normalisation: the engine normalises, by the checkpoint's own figures.
    """

    placeholder: Placeholder
    fields: ClassVar[Mapping[str, Field]] = {
        "pixel_values": Field("flat"),
        "image_grid_thw": Field("batched", keep_on_cpu=True),
    }

    patch: int
    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int
    resample: Image.Resampling
    backend: Backend

    def with_options(self, options: Mapping[str, Any]) -> Family:
        if not options:
            return self
        bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        for name, value in _flattened(options).items():
            if name not in bounds:
                raise RequestError(f"unknown processor option {name!r}", f"mm_processor_kwargs.{name}")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"{name} must be a positive integer", f"mm_processor_kwargs.{name}")
            bounds[name] = value
        if bounds["min_pixels"] > bounds["max_pixels"]:
            raise RequestError("min_pixels is above max_pixels", "mm_processor_kwargs.min_pixels")
        return replace(self, min_pixels=bounds["min_pixels"], max_pixels=bounds["max_pixels"])

    def replacement(self, size: ImageSize) -> Replacement:
        resized = self._resized(size)
        tokens = (resized.width // self._factor) * (resized.height // self._factor)
        return Replacement((self.placeholder.token_id,) * tokens)

    def tensors(self, pixels: Pixels) -> Tensors:
        height, width = pixels.shape[:2]
        size = self._resized(ImageSize(width, height))
        grid = np.array([1, size.height // self.patch, size.width // self.patch], np.int64)
        planes = resize(pixels, size, self.resample, self.backend)
        return {
            "pixel_values": patches(planes, self.patch, self.merge, self.temporal),
            "image_grid_thw": grid,
        }

    def embeds(self, tensors: Tensors) -> int:
        checked_tensor(tensors, "image_grid_thw", (3,))
        times, rows, columns = checked_sides(tensors, "image_grid_thw", self.merge)
        if times != 1:
            raise ValueError(f"image_grid_thw should begin with 1, it is {times}")
        checked_pixels(tensors, (rows * columns, 3 * self.temporal * self.patch**2), RAW_OR_FLOATS)
        return rows * columns // self.merge**2

    def largest_image(self, max_tokens: int) -> ImageSize:
        pixels = max(1, min(self.max_pixels // self._factor**2, max_tokens))
        rows = int(pixels**0.5)
        return ImageSize(pixels // rows * self._factor, rows * self._factor)

    @property
    def _factor(self) -> int:
        return self.patch * self.merge

    def _resized(self, size: ImageSize) -> ImageSize:
        return smart_resize(size, self._factor, self.min_pixels, self.max_pixels)


def build(checkpoint: Checkpoint, config: RendererConfig) -> Family:
    """The family of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, with its own image processor's figures.

    Raises:
        ConfigError: `mm_processor_kwargs` of the configuration holds something unknown.
    """
    processor = checkpoint.image_processor()
    ids = checkpoint.config
    frame = (ids.vision_start_token_id, ids.image_token_id, ids.vision_end_token_id)
    family = QwenVL(
        name=checkpoint.model_type,
        placeholder=Placeholder(ids.image_token_id, "".join(checkpoint.tokenizer.pieces(frame))),
        embed_id=ids.image_token_id,
        reserved_ids=frozenset({ids.video_token_id}),
        patch=processor.patch_size,
        merge=processor.merge_size,
        temporal=processor.temporal_patch_size,
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
        resample=Image.Resampling(processor.resample),
        backend=config.image_backend,
    )
    try:
        return family.with_options(config.mm_processor_kwargs)
    except RequestError as error:
        raise ConfigError(error.message, error.param) from error


def _flattened(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with `size`, the newer spelling of the bounds, taken apart."""
    flat = {name: value for name, value in options.items() if name != "size"}
    size = options.get("size", {})
    if not isinstance(size, Mapping):
        raise RequestError("size must be an object", "mm_processor_kwargs.size")
    names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    return {names.get(str(name), str(name)): value for name, value in size.items()} | flat

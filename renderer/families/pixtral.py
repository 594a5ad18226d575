"""Pixtral and Mistral 3 in Hugging Face's form: images keep their shape, a token a patch, a break token a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.families.base import ProcessedImages, image_placeholder, masked
from renderer.families.checks import FLOATS, RAW_OR_FLOATS, checked_pixels
from renderer.families.hf_processor import ImageProcessor, longest_edge
from renderer.family import Family, Field, Placeholder
from renderer.pixels import Pixels
from renderer.placeholders import Replacement
from renderer.prompt import ImageSize, Tensors

_MAX_EDGE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixtral(ProcessedImages):
    """`pixel_values` [3, height, width] of the resized image: float32, or uint8 where the engine normalises.

    Attributes:
        step: Pixels on a side of what becomes one token.
        break_id, end_id: Tokens at the end of a row, and of the last row.
    """

    placeholder: Placeholder
    fields: ClassVar[Mapping[str, Field]] = {"pixel_values": Field("batched")}

    step: int
    break_id: int
    end_id: int

    def replacement(self, size: ImageSize) -> Replacement:
        return _in_rows(self.placeholder.token_id, self.break_id, self.end_id, *grid(size, self._edge, self.step))

    def tensors(self, pixels: Pixels) -> Tensors:
        return {"pixel_values": np.ascontiguousarray(self.processor(pixels)["pixel_values"][0])}

    def embeds(self, tensors: Tensors) -> int:
        dtypes = FLOATS if self.processor.hf.do_normalize else RAW_OR_FLOATS
        _, height, width = checked_pixels(tensors, (3, None, None), dtypes).shape
        if max(height, width) > self._edge or height % self.step or width % self.step:
            raise ValueError(f"pixel_values should have sides of multiples of {self.step} up to {self._edge}")
        return int(height // self.step * (width // self.step))

    def largest_image(self, max_tokens: int) -> ImageSize:
        rows = min(self._edge // self.step, max(1, math.isqrt(max_tokens) - 1))
        return ImageSize(rows * self.step, rows * self.step)

    @property
    def _edge(self) -> int:
        return int(self.processor.hf.size.longest_edge)


def grid(size: ImageSize, longest: int, step: int) -> tuple[int, int]:
    """Rows and columns of tokens of an image that is shrunk into a square of `longest` pixels, then filled up to steps.

    The formula of Pixtral's image processor.

    Raises:
        ValueError: It is so thin that nothing of it would be left, which that processor cannot resize either.
    """
    excess = max(size.height / longest, size.width / longest)
    height, width = size.height, size.width
    if excess > 1:
        height, width = math.floor(height / excess), math.floor(width / excess)
    if min(height, width) < 1:
        raise ValueError(f"its sides of {size.width} and {size.height} pixels are too unlike")
    return (height - 1) // step + 1, (width - 1) // step + 1


@lru_cache(maxsize=128)
def _in_rows(image_id: int, break_id: int, end_id: int, rows: int, columns: int) -> Replacement:
    row = (image_id,) * columns
    return masked((*row, break_id) * (rows - 1) + (*row, end_id), image_id)


def build(checkpoint: Checkpoint, config: RendererConfig, **settings: Any) -> Family:
    """The family of a Pixtral checkpoint.

    Args:
        settings: Of the image processor, beside the checkpoint's own.

    Raises:
        ConfigError: `mm_processor_kwargs` holds something unknown.
    """
    hf = checkpoint.config
    step = hf.vision_config.patch_size * getattr(hf, "spatial_merge_size", 1)
    return Pixtral(
        name="pixtral" if checkpoint.model_type == "llava" else checkpoint.model_type,
        placeholder=image_placeholder(checkpoint),
        embed_id=hf.image_token_id,
        processor=ImageProcessor.load(
            checkpoint, config, {"size": longest_edge(step, _MAX_EDGE)}, {"patch_size": step, **settings}
        ),
        step=step,
        break_id=checkpoint.tokenizer.id_of("[IMG_BREAK]"),
        end_id=checkpoint.tokenizer.id_of("[IMG_END]"),
    )


def build_mistral3(checkpoint: Checkpoint, config: RendererConfig) -> Family:
    """The family of a Mistral 3 checkpoint, whose engines normalise.

    Raises:
        ConfigError: `mm_processor_kwargs` holds something unknown.
    """
    return build(checkpoint, config, do_rescale=False, do_normalize=False)

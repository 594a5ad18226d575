"""LLaVA 1.5: every image becomes one square of one size, and a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import ConfigError
from renderer.families import pixtral
from renderer.families.base import ProcessedImages, image_placeholder
from renderer.families.checks import checked_pixels
from renderer.families.hf_processor import ImageProcessor
from renderer.family import Family, Field
from renderer.pixels import Pixels
from renderer.placeholders import Replacement
from renderer.prompt import ImageSize, Tensors

# Tokens of a vision tower that stand for no patch.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
# The shorter side is resized to the square's before the crop: a thread of pixels would become a picture of gigabytes.
_MAX_RESIZED_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Llava(ProcessedImages):
    """`pixel_values` float32 [3, side, side]."""

    fields: ClassVar[Mapping[str, Field]] = {"pixel_values": Field("batched")}

    side: int
    replaced_by: Replacement

    def replacement(self, size: ImageSize) -> Replacement:
        longer, shorter = max(size.width, size.height), min(size.width, size.height)
        if self.side**2 * longer / shorter > _MAX_RESIZED_PIXELS:
            raise ValueError(f"its sides of {longer} and {shorter} pixels are too unlike")
        return self.replaced_by

    def tensors(self, pixels: Pixels) -> Tensors:
        return {"pixel_values": np.ascontiguousarray(self.processor(pixels)["pixel_values"][0])}

    def embeds(self, tensors: Tensors) -> int:
        checked_pixels(tensors, (3, self.side, self.side))
        return len(self.replaced_by.token_ids)

    def largest_image(self, max_tokens: int) -> ImageSize:
        return ImageSize(self.side, self.side)


def build(checkpoint: Checkpoint, config: RendererConfig) -> Family:
    """The family of a LLaVA checkpoint; Pixtral's checkpoints are of the same model type.

    Raises:
        ConfigError: Its vision tower is not known, or `mm_processor_kwargs` holds something unknown.
    """
    if checkpoint.config.vision_config.model_type == "pixtral":
        return pixtral.build(checkpoint, config)
    placeholder = image_placeholder(checkpoint)
    tokens = vision_tokens(checkpoint.config)
    return Llava(
        name=checkpoint.model_type,
        placeholder=placeholder,
        embed_id=placeholder.token_id,
        processor=ImageProcessor.load(checkpoint, config),
        side=checkpoint.config.vision_config.image_size,
        replaced_by=Replacement((placeholder.token_id,) * tokens),
    )


def vision_tokens(config: Any) -> int:
    """Tokens that the vision tower of a LLaVA model gives for one square.

    Raises:
        ConfigError: The tower, or how its tokens are chosen, is not known.
    """
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    if vision.model_type not in _CLASS_TOKENS or strategy not in ("default", "full"):
        raise ConfigError(f"LLaVA with vision tower {vision.model_type!r} and {strategy!r} features is not known")
    every = int(vision.image_size // vision.patch_size) ** 2 + _CLASS_TOKENS[vision.model_type]
    return every - 1 if strategy == "default" else every

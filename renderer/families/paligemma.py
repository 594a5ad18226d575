"""PaliGemma: at most one image, a square, whose tokens stand before the prompt without any placeholder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import ConfigError
from renderer.families.base import ProcessedImages, masked
from renderer.families.checks import checked_pixels
from renderer.families.hf_processor import ImageProcessor
from renderer.family import Family, Field
from renderer.pixels import Pixels
from renderer.placeholders import Replacement
from renderer.prompt import ImageSize, PlaceholderRange, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class PaliGemma(ProcessedImages):
    """`pixel_values` float32 [3, side, side]."""

    max_items: ClassVar[int | None] = 1
    # Its checkpoints have none: messages are put one after the other.
    default_template: ClassVar[str | None] = "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}"
    fields: ClassVar[Mapping[str, Field]] = {"pixel_values": Field("batched")}

    side: int
    replaced_by: Replacement
    newline_id: int

    def replacement(self, size: ImageSize) -> Replacement:
        return self.replaced_by

    def place(
        self, token_ids: Sequence[int], replacements: Sequence[Replacement], field: str
    ) -> tuple[list[int], tuple[PlaceholderRange, ...]]:
        """The image's tokens and the begin token, the prompt, and a newline, if it does not end with one."""
        if not replacements:
            return list(token_ids), ()
        (image,) = replacements
        expanded = [*image.token_ids, *token_ids]
        if expanded[-1] != self.newline_id:
            expanded.append(self.newline_id)
        return expanded, (PlaceholderRange(0, len(image.token_ids), image.embed_mask),)

    def tensors(self, pixels: Pixels) -> Tensors:
        return {"pixel_values": np.ascontiguousarray(self.processor(pixels)["pixel_values"][0])}

    def embeds(self, tensors: Tensors) -> int:
        checked_pixels(tensors, (3, self.side, self.side))
        return sum(self.replaced_by.embed_mask or ())

    def largest_image(self, max_tokens: int) -> ImageSize:
        return ImageSize(self.side, self.side)


def build(checkpoint: Checkpoint, config: RendererConfig) -> Family:
    """The family of a PaliGemma checkpoint.

    Raises:
        ConfigError: The tokenizer lacks a token, or `mm_processor_kwargs` holds something unknown.
    """
    hf, tokenizer = checkpoint.config, checkpoint.tokenizer
    if tokenizer.hf.bos_token_id is None:
        raise ConfigError("PaliGemma's tokenizer needs a begin token")
    side = hf.vision_config.image_size
    tokens = (side // hf.vision_config.patch_size) ** 2
    return PaliGemma(
        name=checkpoint.model_type,
        placeholder=None,
        embed_id=hf.image_token_id,
        reserved_ids=frozenset({hf.image_token_id}),
        processor=ImageProcessor.load(checkpoint, config),
        side=side,
        replaced_by=masked((*(hf.image_token_id,) * tokens, tokenizer.hf.bos_token_id), hf.image_token_id),
        newline_id=tokenizer.id_of("\n"),
    )

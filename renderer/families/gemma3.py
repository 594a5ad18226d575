"""Gemma 3: squares of one size framed by newlines, which merge with the newlines around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.families.base import ImageFamily, ProcessedImages, image_placeholder, masked
from renderer.families.checks import check_number, checked_pixels
from renderer.families.hf_processor import ImageProcessor, is_flag, ratio, whole
from renderer.family import Family, Field
from renderer.pixels import Pixels
from renderer.placeholders import Replacement
from renderer.prompt import ImageSize, PlaceholderRange, Tensors

_OPTIONS = {
    "do_pan_and_scan": is_flag,
    "pan_and_scan_min_crop_size": whole(1, 8192),
    "pan_and_scan_max_num_crops": whole(1, 64),
    "pan_and_scan_min_ratio_to_activate": ratio,
}
# What Hugging Face's processor of Gemma 3 sets where `preprocessor_config.json` leaves them open.
_PAN_AND_SCAN = {
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3(ProcessedImages):
    """`pixel_values` float32 [1 + crops, 3, side, side], `num_patches` int64 []: 1 + crops.

    Attributes:
        text_of: Tokens of an image with so many crops.
        newlines: Tokens of one to four newlines.
    """

    fields: ClassVar[Mapping[str, Field]] = {
        "pixel_values": Field("flat"),
        "num_patches": Field("batched", keep_on_cpu=True),
    }

    text_of: Callable[[int], Replacement]
    newlines: tuple[int, int, int, int]

    def replacement(self, size: ImageSize) -> Replacement:
        return self.text_of(self._crops(size))

    def place(
        self, token_ids: Sequence[int], replacements: Sequence[Replacement], field: str
    ) -> tuple[list[int], tuple[PlaceholderRange, ...]]:
        """Replacements begin and end with two newlines, which become one token with those of the text beside them.

        A range covers the merged tokens at its ends. One that two images share belongs to the first. Without an image
        token ids stay as they are given.
        """
        if not replacements:
            return ImageFamily.place(self, token_ids, replacements, field)
        expanded, ranges = ImageFamily.place(self, token_ids, replacements, field)
        return merge_newlines(expanded, ranges, self.newlines)

    def tensors(self, pixels: Pixels) -> Tensors:
        crops = np.stack(self.processor(pixels)["pixel_values"])
        return {"pixel_values": crops, "num_patches": np.array(len(crops), np.int64)}

    def embeds(self, tensors: Tensors) -> int:
        size = self.processor.hf.size
        count = len(checked_pixels(tensors, (None, 3, int(size.height), int(size.width))))
        check_number(tensors, "num_patches", count)
        return count * sum(self.text_of(0).embed_mask or ())

    def largest_image(self, max_tokens: int) -> ImageSize:
        side = int(self.processor.hf.size.height)
        crops = self.processor.hf.pan_and_scan_max_num_crops if self.processor.hf.do_pan_and_scan else 1
        return ImageSize(side, side * max(1, min(crops, max_tokens // len(self.text_of(0).token_ids) - 1)))

    def _crops(self, size: ImageSize) -> int:
        hf = self.processor.hf
        if not hf.do_pan_and_scan:
            return 0
        return pan_and_scan_crops(
            size,
            hf.pan_and_scan_min_crop_size,
            hf.pan_and_scan_max_num_crops,
            hf.pan_and_scan_min_ratio_to_activate,
        )


def pan_and_scan_crops(size: ImageSize, min_crop: int, max_crops: int, min_ratio: float) -> int:
    """Crops along the longer side of an image; 0 where its sides are alike or the crops would be too small.

    The formula of Gemma 3's image processor.
    """
    longer, shorter = max(size.width, size.height), min(size.width, size.height)
    if longer / shorter < min_ratio:
        return 0
    crops = min(math.floor(longer / shorter + 0.5), longer // min_crop)
    crops = min(max(2, crops), max_crops)
    return 0 if min(math.ceil(longer / crops), shorter) < min_crop else crops


def merge_newlines(
    token_ids: list[int], ranges: Sequence[PlaceholderRange], newlines: tuple[int, int, int, int]
) -> tuple[list[int], tuple[PlaceholderRange, ...]]:
    """Merge the newlines at both ends of every range with their neighbours: 1+2 and 2+1 to 3, and 2+2 to 4.

    Args:
        newlines: Tokens of one to four newlines.
    """
    merged: list[int] = []
    places: list[PlaceholderRange] = []
    done = 0
    for place in ranges:
        merged += _merged(token_ids[done : place.offset + 1], newlines)
        shared = bool(places) and places[-1].end == len(merged)
        start = len(merged) - 1 + shared
        merged += token_ids[place.offset + 1 : place.end - 1]
        mask = place.embed_mask
        places.append(PlaceholderRange(start, len(merged) + 1 - start, mask[shared:] if mask else None))
        done = place.end - 1
    return merged + _merged(token_ids[done:], newlines), tuple(places)


def _merged(token_ids: Sequence[int], newlines: tuple[int, int, int, int]) -> list[int]:
    one, two, three, four = newlines
    merged = list(token_ids)
    for left, right, both in ((one, two, three), (two, one, three), (two, two, four)):
        merged = _joined(merged, left, right, both)
    return merged


def _joined(token_ids: Sequence[int], left: int, right: int, both: int) -> list[int]:
    """Each `left` that a `right` follows becomes one `both` with it, from the left to the right."""
    joined: list[int] = []
    for token_id in token_ids:
        if token_id == right and joined and joined[-1] == left:
            joined[-1] = both
        else:
            joined.append(token_id)
    return joined


def build(checkpoint: Checkpoint, config: RendererConfig) -> Family:
    """The family of a Gemma 3 checkpoint.

    Raises:
        ConfigError: The tokenizer lacks a token, or `mm_processor_kwargs` holds something unknown.
    """
    placeholder = image_placeholder(checkpoint, checkpoint.config.boi_token_id)
    one, two, three, four = (checkpoint.tokenizer.id_of("\n" * count) for count in range(1, 5))
    return Gemma3(
        name=checkpoint.model_type,
        placeholder=placeholder,
        embed_id=checkpoint.config.image_token_id,
        reserved_ids=frozenset({checkpoint.config.image_token_id}),
        processor=ImageProcessor.load(checkpoint, config, _OPTIONS, _pan_and_scan_settings(checkpoint)),
        text_of=_texts(checkpoint),
        newlines=(one, two, three, four),
    )


def _pan_and_scan_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    loaded = checkpoint.image_processor()
    return {name: default for name, default in _PAN_AND_SCAN.items() if getattr(loaded, name, None) is None}


def _texts(checkpoint: Checkpoint) -> Callable[[int], Replacement]:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    begin, soft, end = tokenizer.pieces([config.boi_token_id, config.image_token_id, config.eoi_token_id])
    image = f"\n\n{begin}{soft * config.mm_tokens_per_image}{end}\n\n"

    @cache
    def text_of(crops: int) -> Replacement:
        text = image
        if crops:
            views = " ".join([image] * crops)
            text = f"Here is the original image {image} and here are some crops to help you see better {views}"
        return masked(tokenizer.encode(text, add_special_tokens=False), config.image_token_id)

    return text_of

"""What differs between model families, and the family of models that read text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from renderer.errors import RequestError
from renderer.prompt import PlaceholderRange, Tensors

PlacedItem = tuple[PlaceholderRange, Tensors]


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """How raw pixels become what the vision encoder reads: `(pixels * scale - mean) / std`, per channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Family:
    """Text models: no items, plain positions. Others override what they do otherwise.

    Args:
        model: The Hugging Face model.
        processor: Its image processor; None for a text model.
    """

    takes_images = False
    position_rows = 1

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor

    @property
    def largest_item(self) -> int:
        """Embeddings of the largest image that the processor makes; 0 for a text model."""
        return 0

    def example(self, embeds: int) -> Tensors:
        """An image of at most this many embeddings (and of the fewest possible where that is more), for warm-up."""
        raise RequestError("this model takes no images")

    def check(self, tensors: Tensors) -> int:
        """Number of embeddings of an item.

        Raises:
            RequestError: The vision encoder cannot read it.
        """
        raise RequestError("this model takes no images")

    def encode(self, items: Sequence[Tensors]) -> list[torch.Tensor]:
        """Run the vision encoder once: features [embeddings, features] of each item, the hidden size first."""
        raise RequestError("this model takes no images")

    def positions(self, token_ids: NDArray[np.int32], items: Sequence[PlacedItem]) -> tuple[NDArray[np.int64], int]:
        """Rotary positions of a prompt, int64 [rows, tokens], and what to add to the index of a later token."""
        return np.arange(len(token_ids), dtype=np.int64)[None], 0

    def decoder_inputs(self, visual: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
        """What the decoder takes beside embeddings.

        Args:
            visual: bool [1, tokens], where an item's embeddings stand.
            features: [visual tokens, features beyond the hidden size].
        """
        return {}


class ImageFamily(Family):
    """What models that read images have in common."""

    takes_images = True

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.pixel_format = _pixel_format(processor)
        self.vision = model.config.vision_config
        weight = next(model.get_encoder("image").parameters())
        self._device, self._dtype = weight.device, weight.dtype

    def pixels(self, tensors: Sequence[Tensors], channel_axis: int) -> list[torch.Tensor]:
        """`pixel_values` of each item as the encoder reads them; uint8 is raw, floats are normalised already."""
        values = [torch.from_numpy(item["pixel_values"]).to(self._device) for item in tensors]
        return [normalise(value, self.pixel_format, channel_axis).to(self._dtype) for value in values]

    def to_device(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def normalise(pixels: torch.Tensor, form: PixelFormat, channel_axis: int) -> torch.Tensor:
    """Raw pixels as float32, rescaled and normalised; others as they are."""
    if pixels.dtype != torch.uint8:
        return pixels
    values = pixels.float()
    shape = [1] * pixels.ndim
    shape[channel_axis] = len(form.mean)
    mean = torch.tensor(form.mean, device=pixels.device).view(shape)
    std = torch.tensor(form.std, device=pixels.device).view(shape)
    return values.mul_(form.scale).sub_(mean).div_(std)


def take(tensors: Tensors, required: Sequence[str], optional: Sequence[str] = ()) -> list[NDArray[Any]]:
    """The required tensors, in this order.

    Raises:
        RequestError: One is missing, or there is one that the family does not know.
    """
    if not set(required) <= set(tensors) <= {*required, *optional}:
        raise RequestError(f"an image of this model has the tensors {list(required)}, got {sorted(tensors)}")
    return [np.asarray(tensors[name]) for name in required]


def check_pixels(pixels: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raises RequestError unless the pixels have this shape and are uint8 or floats."""
    if pixels.shape != shape:
        raise RequestError(f"pixel_values must be {list(shape)}, got {list(pixels.shape)}")
    if pixels.dtype not in (np.uint8, np.float16, np.float32):
        raise RequestError(f"pixel_values must be uint8, float16 or float32, got {pixels.dtype}")


def _pixel_format(processor: Any) -> PixelFormat:
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return PixelFormat(scale, (0.0,) * 3, (1.0,) * 3)
    return PixelFormat(scale, tuple(processor.image_mean), tuple(processor.image_std))

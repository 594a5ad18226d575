"""Hugging Face's own image processors, with either backend's arithmetic and without torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.dlpack import from_dlpack
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_resize_output_image_size

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import ConfigError, RequestError
from renderer.pixels import Backend, Pixels, resize
from renderer.prompt import ImageSize

Check = Callable[[Any], bool]


class TorchvisionArithmetic(PilBackend):  # type: ignore[misc]
    """What Hugging Face's torchvision backend computes otherwise than its Pillow backend.

    Put between a family's Pillow class and `PilBackend`, it makes that class give the torchvision class's tensors: the
    two differ in how they resample, and in that torchvision's rescales and normalises in one step, of float32.
    Images are uint8 [3, height, width].
    """

    def resize(self, image: Pixels, size: Any, resample: int | None = None, **_: Any) -> Pixels:
        height, width = _target(image, size)
        chosen = Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)
        return resize(image.transpose(1, 2, 0), ImageSize(width, height), chosen, "torchvision")

    def rescale(self, image: NDArray[Any], scale: float, **_: Any) -> NDArray[Any]:
        if self.do_normalize:
            return image
        scaled: NDArray[Any] = (_floats(image) * scale).numpy()
        return scaled

    def normalize(
        self, image: NDArray[Any], mean: Iterable[float], std: Iterable[float], **_: Any
    ) -> NDArray[np.float32]:
        scale = 1.0 / self.rescale_factor if self.do_rescale else 1.0
        shift, spread = (torch.tensor(tuple(values))[:, None, None] * scale for values in (mean, std))
        normalised: NDArray[np.float32] = _floats(image).sub_(shift).div_(spread).numpy()
        return normalised


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """A checkpoint's image processor, called on one image at a time. Thread-safe.

    Attributes:
        hf: Hugging Face's processor, for its settings.
        taken: The options that a request may set, and what makes a value of each possible.
    """

    hf: Any
    taken: Mapping[str, Check]

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: RendererConfig,
        taken: Mapping[str, Check] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> ImageProcessor:
        """Load a checkpoint's image processor, with the configuration's options.

        Args:
            settings: What the family's multimodal processor sets beyond `preprocessor_config.json`.

        Raises:
            ConfigError: `mm_processor_kwargs` of the configuration holds something unknown.
        """
        loaded = checkpoint.image_processor()
        pil_class: Any = type(loaded)
        hf_class = _with_backend(pil_class, config.image_backend)
        processor = cls(hf_class.from_dict({**loaded.to_dict(), **(settings or {})}), taken or {})
        try:
            return processor.with_options(config.mm_processor_kwargs)
        except RequestError as error:
            raise ConfigError(error.message, error.param) from error

    def with_options(self, options: Mapping[str, Any]) -> ImageProcessor:
        """The same processor with other settings.

        Raises:
            RequestError: An option is not one that the family takes, or has an impossible value.
        """
        if not options:
            return self
        for name, value in options.items():
            if name not in self.taken:
                raise RequestError(f"unknown processor option {name!r}", f"mm_processor_kwargs.{name}")
            if not self.taken[name](value):
                raise RequestError(f"{value!r} is not possible for {name}", f"mm_processor_kwargs.{name}")
        return ImageProcessor(type(self.hf).from_dict({**self.hf.to_dict(), **options}), self.taken)

    def __call__(self, pixels: Pixels) -> Mapping[str, Any]:
        """The processor's output for one image.

        Args:
            pixels: uint8 [height, width, 3].

        Raises:
            ValueError: The processor cannot take the image.
        """
        output: Mapping[str, Any] = self.hf([pixels], input_data_format="channels_last", return_tensors=None)
        return output


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def whole(lowest: int, highest: int) -> Check:
    """Whole numbers of a range."""
    return lambda value: type(value) is int and lowest <= value <= highest


def ratio(value: Any) -> bool:
    return type(value) in (int, float) and value >= 1


def longest_edge(lowest: int, highest: int) -> Check:
    """`{"longest_edge": pixels}` in a range."""
    edge = whole(lowest, highest)
    return lambda value: isinstance(value, Mapping) and set(value) == {"longest_edge"} and edge(value["longest_edge"])


@cache
def _with_backend(pil_class: Any, backend: Backend) -> Any:
    return pil_class if backend == "pil" else type(pil_class.__name__, (pil_class, TorchvisionArithmetic), {})


def _target(image: Pixels, size: Any) -> tuple[int, int]:
    """Height and width that a size of a processor's settings means for an image."""
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge and not size.longest_edge:
        target: tuple[int, int] = get_resize_output_image_size(
            image, size=size.shortest_edge, default_to_square=False, input_data_format="channels_first"
        )
        return target
    raise ConfigError(f"images cannot be resized to {size}")


def _floats(image: NDArray[Any]) -> torch.Tensor:
    """float32 [3, height, width], rows one after the other in memory."""
    return from_dlpack(image).to(torch.float32, memory_format=torch.contiguous_format)

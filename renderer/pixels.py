"""Pixels to pixels: resampling as Hugging Face's two backends do it, and cutting into patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.dlpack import from_dlpack

from renderer.prompt import ImageSize

Pixels = NDArray[np.uint8]
Backend = Literal["torchvision", "pil"]

_TORCH_MODES = {
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
    Image.Resampling.LANCZOS: "lanczos",
}


def resize(pixels: Pixels, size: ImageSize, resample: Image.Resampling, backend: Backend) -> Pixels:
    """Resample an image and take its channels apart.

    Returns:
        uint8 [3, height, width], one plane after the other in memory.
    """
    return planes(resized(pixels, size, resample, backend))


def resized(pixels: Pixels, size: ImageSize, resample: Image.Resampling, backend: Backend) -> Pixels:
    """Resample an image.

    Args:
        pixels: uint8 [height, width, 3].
        resample: BILINEAR, BICUBIC or LANCZOS with backend "torchvision", any filter with "pil".
        backend: Whose bytes to reproduce. torchvision resizes uint8 through torch's antialiased kernels, which are
            called here directly; Pillow's own filters differ from them by up to 3 levels.

    Returns:
        uint8 [height, width, 3].
    """
    if pixels.shape[:2] == (size.height, size.width):
        return pixels
    if backend == "pil":
        return np.asarray(Image.fromarray(pixels).resize((size.width, size.height), resample))
    # The batch is added before the channels move to the front: torch then sees that they are the last in memory, and
    # its kernel neither gathers nor scatters them.
    batch = from_dlpack(pixels)[None].permute(0, 3, 1, 2)
    target, mode = (size.height, size.width), _TORCH_MODES[resample]
    output = torch.nn.functional.interpolate(batch, target, mode=mode, antialias=True, align_corners=False)
    channels_last: Pixels = output[0].permute(1, 2, 0).numpy()
    return channels_last


def planes(pixels: Pixels) -> Pixels:
    """An image's channels, one after the other in memory: uint8 [3, height, width] of uint8 [height, width, 3].

    torch does this several times as fast as numpy.
    """
    apart: Pixels = from_dlpack(pixels).permute(2, 0, 1).contiguous().numpy()
    return apart


def normalised(
    images: Sequence[Pixels], mean: Iterable[float], std: Iterable[float], scale: float
) -> NDArray[np.float32]:
    """Rescale and normalise images of one size in one step, as torchvision's backend does.

    Args:
        images: uint8 [height, width, 3] each.
        scale: What stands for 1 in them.

    Returns:
        float32 [images, 3, height, width].
    """
    shift, spread = (torch.tensor(tuple(values))[:, None, None] * scale for values in (mean, std))
    # numpy asks for huge pages, torch does not: memory that is new each time would cost more than the arithmetic.
    output = np.empty((len(images), 3, *images[0].shape[:2]), np.float32)
    for values, image in zip(output, images, strict=True):
        from_dlpack(values).copy_(from_dlpack(planes(image))).sub_(shift).div_(spread)
    return output


def patches(pixels: Pixels, patch: int, merge: int, temporal: int) -> Pixels:
    """Cut an image into flattened patches, in the order of Qwen2-VL.

    Rows go block by block of merge x merge patches: (block row, block column, row in block, column in block). Columns
    are (channel, time, row in patch, column in patch); a still image is repeated for each of `temporal` times.

    Args:
        pixels: uint8 [channels, height, width], sides multiples of patch * merge.

    Returns:
        uint8 [height * width / patch**2, channels * temporal * patch**2].
    """
    channels, height, width = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    # A patch's row is copied as one element, and a block row at a time, while it is in the processor's cache.
    patch_row, whole_patch = np.dtype((np.void, patch)), np.dtype((np.void, patch**2))
    source = np.ascontiguousarray(pixels).view(patch_row).reshape(channels, rows, merge, patch, columns, merge)
    blocks = source.transpose(1, 4, 2, 5, 0, 3)
    flat = np.empty((rows, columns, merge, merge, channels, temporal, patch), patch_row)
    repeats = flat.view(whole_patch)[..., 0]
    for row in range(rows):
        flat[row, :, :, :, :, 0] = blocks[row]
        repeats[row, :, :, :, :, 1:] = repeats[row, :, :, :, :, :1]
    return flat.view(np.uint8).reshape(rows * columns * merge**2, channels * temporal * patch**2)

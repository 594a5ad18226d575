"""Resampling equals the backend it names; patches are Hugging Face's."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from renderer.pixels import Backend, patches, resize
from renderer.prompt import ImageSize
from tests.renderer.builders import picture

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
SIZES = [(56, 84), (28, 28), (336, 224), (28, 560)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("filter_", [BICUBIC, BILINEAR])
def test_pil_is_pillows_resize(size: tuple[int, int], filter_: Image.Resampling) -> None:
    image = picture(97, 61)
    resized = resize(np.array(image), ImageSize(*size), filter_, "pil")
    np.testing.assert_array_equal(resized.transpose(1, 2, 0), np.asarray(image.resize(size, filter_)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("filter_", "mode"), [(BICUBIC, "bicubic"), (BILINEAR, "bilinear")])
def test_torchvision_is_torchs_antialiased_resize_of_planes(
    size: tuple[int, int], filter_: Image.Resampling, mode: str
) -> None:
    pixels = np.array(picture(97, 61))
    planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    expected = torch.nn.functional.interpolate(planes, size[::-1], mode=mode, antialias=True, align_corners=False)
    np.testing.assert_array_equal(resize(pixels, ImageSize(*size), filter_, "torchvision"), expected[0].numpy())


def test_the_two_backends_differ_by_a_few_levels_at_most() -> None:
    pixels = np.array(picture(320, 240))
    torchs, pillows = (
        resize(pixels, ImageSize(224, 168), BICUBIC, name).astype(int) for name in ("torchvision", "pil")
    )
    assert 0 < np.abs(torchs - pillows).max() <= 3


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_an_image_of_the_right_size_is_left_as_it_is(backend: Backend) -> None:
    pixels = np.array(picture(56, 28))
    np.testing.assert_array_equal(resize(pixels, ImageSize(56, 28), BICUBIC, backend), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(("patch", "merge", "temporal"), [(14, 2, 2), (16, 2, 2), (14, 1, 1), (8, 3, 3)])
def test_patches_are_hugging_faces(patch: int, merge: int, temporal: int) -> None:
    pixels = np.array(picture(patch * merge * 3, patch * merge * 2)).transpose(2, 0, 1)
    flat, rows, columns = Qwen2VLImageProcessorPil().patchify(pixels, patch, merge, temporal)
    assert (rows, columns) == (merge * 2, merge * 3)
    own = patches(pixels, patch, merge, temporal)
    assert own.dtype == np.uint8
    np.testing.assert_array_equal(own, flat)

"""Resampling equals the backend it names; patches are Hugging Face's."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from renderer.families.hf_processor import TorchvisionArithmetic
from renderer.pixels import Backend, normalised, patches, resize, resized
from renderer.prompt import ImageSize
from tests.renderer.builders import picture

BICUBIC, BILINEAR, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS
SIZES = [(56, 84), (28, 28), (336, 224), (28, 560)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("filter_", [BICUBIC, BILINEAR])
def test_pil_is_pillows_resize(size: tuple[int, int], filter_: Image.Resampling) -> None:
    image = picture(97, 61)
    resized = resize(np.array(image), ImageSize(*size), filter_, "pil")
    np.testing.assert_array_equal(resized.transpose(1, 2, 0), np.asarray(image.resize(size, filter_)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("filter_", "mode"), [(BICUBIC, "bicubic"), (BILINEAR, "bilinear"), (LANCZOS, "lanczos")])
def test_torchvision_is_torchs_antialiased_resize_of_planes(
    size: tuple[int, int], filter_: Image.Resampling, mode: str
) -> None:
    pixels = np.array(picture(97, 61))
    planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    expected = torch.nn.functional.interpolate(planes, size[::-1], mode=mode, antialias=True, align_corners=False)
    np.testing.assert_array_equal(resize(pixels, ImageSize(*size), filter_, "torchvision"), expected[0].numpy())


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_pixels_keep_the_order_that_the_fast_kernel_takes(backend: Backend) -> None:
    pixels = np.array(picture(97, 61))
    first = resized(pixels, ImageSize(84, 56), BICUBIC, backend)
    assert first.flags.c_contiguous
    assert resize(pixels, ImageSize(84, 56), BICUBIC, backend).flags.c_contiguous


def test_normalising_is_hugging_faces_for_every_value_of_a_pixel() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    settings = {"image_mean": mean, "image_std": std, "do_rescale": True, "rescale_factor": 1 / 255}
    processor = type("", (LlavaImageProcessorPil, TorchvisionArithmetic), {})(**settings)
    expected = processor.normalize(every.transpose(2, 0, 1), mean, std)
    np.testing.assert_array_equal(normalised([every, every], mean, std, 255.0), np.stack([expected, expected]))


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

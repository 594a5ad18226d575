"""Qwen2-VL's and Qwen2.5-VL's tensors and tokens equal Hugging Face's."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import ConfigError, RequestError
from renderer.families import choose_family
from renderer.family import Family
from renderer.prompt import ImageSize
from tests.checkpoints import checkpoint
from tests.renderer.builders import DEMO, picture

# The demo model's lower bound of pixels makes so many tokens of its smallest image.
MIN_TOKENS = 16
SIZES = [(64, 64), (640, 480), (97, 61), (1, 1), (1, 100), (100, 1), (448, 448), (513, 512), (1000, 20), (300, 900)]


@cache
def family(model: str = str(DEMO), backend: str = "torchvision") -> Family:
    config = RendererConfig.model_validate({"model": model, "image_backend": backend})
    return choose_family(Checkpoint.load(config), config)


def hf_tensors(model: str, image: Image.Image, **options: Any) -> dict[str, Any]:
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    batch = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np", **options)
    return {"pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"][0]}


@pytest.mark.parametrize("size", SIZES)
def test_pil_tensors_are_hugging_faces_bit_for_bit(size: tuple[int, int]) -> None:
    image = picture(*size)
    own, expected = family(backend="pil").tensors(np.array(image)), hf_tensors(str(DEMO), image)
    assert own.keys() == expected.keys()
    assert own["pixel_values"].dtype == np.uint8
    assert own["image_grid_thw"].dtype == np.int64
    for name, tensor in own.items():
        np.testing.assert_array_equal(tensor, expected[name])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_checkpoints_own_bounds_are_used(name: str) -> None:
    model, image = str(checkpoint(name)), picture(700, 500)
    own, expected = family(model, "pil").tensors(np.array(image)), hf_tensors(model, image)
    np.testing.assert_array_equal(own["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
def test_the_tokens_of_a_size_are_those_of_the_tensors(size: tuple[int, int]) -> None:
    grid = family().tensors(np.array(picture(*size)))["image_grid_thw"]
    replacement = family().replacement(ImageSize(*size))
    assert replacement.token_ids == (family().placeholder.token_id,) * (int(np.prod(grid)) // 4)  # type: ignore[union-attr]
    assert replacement.embed_mask is None


@pytest.mark.parametrize(
    "options", [{"max_pixels": 50176}, {"min_pixels": 100352}, {"size": {"shortest_edge": 6272, "longest_edge": 50176}}]
)
def test_options_move_the_bounds_as_they_do_in_hugging_face(options: dict[str, Any]) -> None:
    image = picture(300, 200)
    bounds = {"shortest_edge": 12544, "longest_edge": 200704}
    bounds |= options.get("size", {})
    bounds |= {edge: options[name] for name, edge in NAMES.items() if name in options}
    own = family(backend="pil").with_options(options)
    assert own != family(backend="pil")
    expected = hf_tensors(str(DEMO), image, size=bounds)
    np.testing.assert_array_equal(own.tensors(np.array(image))["pixel_values"], expected["pixel_values"])


NAMES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"do_resize": False}, "mm_processor_kwargs.do_resize"),
        ({"max_pixels": "many"}, "mm_processor_kwargs.max_pixels"),
        ({"max_pixels": 0}, "mm_processor_kwargs.max_pixels"),
        ({"max_pixels": True}, "mm_processor_kwargs.max_pixels"),
        ({"size": 3}, "mm_processor_kwargs.size"),
        ({"size": {"height": 3}}, "mm_processor_kwargs.height"),
        ({"min_pixels": 300_000}, "mm_processor_kwargs.min_pixels"),
    ],
)
def test_an_impossible_option_is_refused_by_name(options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        family().with_options(options)
    assert caught.value.param == param


def test_options_of_the_configuration_are_checked_at_start() -> None:
    config = RendererConfig(model=str(DEMO), mm_processor_kwargs={"max_pixel": 1})
    with pytest.raises(ConfigError, match="max_pixel"):
        choose_family(Checkpoint.load(config), config)


@pytest.mark.parametrize("tokens", [1, 16, 100, 256, 10_000])
def test_the_largest_image_has_the_most_tokens_allowed(tokens: int) -> None:
    size = family().largest_image(tokens)
    made = len(family().replacement(size).token_ids)
    assert 0.9 * min(tokens, 256) <= made <= max(tokens, MIN_TOKENS)


def test_a_picture_too_long_and_thin_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio"):
        family().replacement(ImageSize(1, 400))

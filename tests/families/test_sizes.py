"""Sizes to tokens, by tables, and for any size against the formulas of Hugging Face's processors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    get_resize_output_image_size as enlarged_for_idefics3,
)
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)

from renderer.conversation import CompletionRequest
from renderer.families.gemma3 import Gemma3, merge_newlines, pan_and_scan_crops
from renderer.families.idefics3 import tiles
from renderer.families.llava_next import LlavaNext, shrunk, unpadded
from renderer.families.pixtral import grid
from renderer.prompt import ImageSize, PlaceholderRange
from tests.families.conftest import RendererOf

SIDES = st.integers(1, 5000)
SIZES = st.builds(ImageSize, SIDES, SIDES)
ANY_SIZE = settings(deadline=None, max_examples=300, derandomize=True)


def pixels(size: ImageSize) -> Any:
    """An image of that size without memory of its own."""
    return np.broadcast_to(np.uint8(0), (3, size.height, size.width))


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(640, 480, (3, 4)), (480, 640, (4, 3)), (1, 1, (4, 4)), (364, 364, (4, 4)), (2000, 300, (1, 4)), (1, 400, (4, 1))],
)
def test_tiles_of_idefics3(width: int, height: int, expected: tuple[int, int]) -> None:
    assert tiles(ImageSize(width, height), 1456, 364) == expected


def test_an_image_of_idefics3_that_one_tile_holds_is_not_split() -> None:
    assert tiles(ImageSize(300, 300), 364, 364) == (0, 0)
    assert tiles(ImageSize(300, 900), 364, 364) == (0, 0)
    assert tiles(ImageSize(300, 300), 365, 364) == (2, 2)


@ANY_SIZE
@given(SIZES, st.sampled_from([(1456, 364), (728, 364), (2048, 512), (1000, 364), (4096, 512)]))
def test_tiles_are_those_that_hugging_face_cuts(size: ImageSize, setting: tuple[int, int]) -> None:
    longest, side = setting
    height, width = enlarged_for_idefics3(pixels(size), longest)
    steps = SimpleNamespace(resize=lambda image, size, **_: (size.height // side, size.width // side))
    resize_for_vision_encoder: Any = Idefics3ImageProcessorPil.resize_for_vision_encoder
    expected = resize_for_vision_encoder(steps, pixels(ImageSize(width, height)), side)
    assert tiles(size, longest, side) == (expected if expected != (1, 1) else (0, 0))


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(1024, 1024, (64, 64)), (1, 1, (1, 1)), (16, 17, (2, 1)), (2048, 1024, (32, 64)), (3000, 10, (1, 64))],
)
def test_grid_of_pixtral(width: int, height: int, expected: tuple[int, int]) -> None:
    assert grid(ImageSize(width, height), 1024, 16) == expected


@ANY_SIZE
@given(SIZES, st.sampled_from([(1024, 16), (1540, 28), (512, 16)]))
def test_the_grid_of_pixtral_is_hugging_faces(size: ImageSize, setting: tuple[int, int]) -> None:
    longest, step = setting
    expected = get_resize_output_image_size(pixels(size), longest, step, "channels_first")
    if 0 in expected:
        with pytest.raises(ValueError, match="too unlike"):
            grid(size, longest, step)
    else:
        rows, columns = grid(size, longest, step)
        assert (rows * step, columns * step) == expected


@pytest.mark.parametrize(("width", "height"), [(1, 1100), (1100, 1), (2, 5000), (9000, 3)])
def test_what_is_too_thin_for_the_grid_of_pixtral_is_too_thin_for_hugging_face(width: int, height: int) -> None:
    size = ImageSize(width, height)
    processor = PixtralImageProcessorPil(size={"longest_edge": 1024}, patch_size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="Size must contain"):
        processor([np.ascontiguousarray(pixels(size))], input_data_format="channels_first")
    with pytest.raises(ValueError, match=f"{width} and {height} pixels are too unlike"):
        grid(size, 1024, 16)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(1000, 1000, 0), (1280, 720, 2), (720, 1280, 2), (2000, 300, 4), (400, 100, 0), (1200, 1000, 2), (1199, 1000, 0)],
)
def test_crops_of_gemma3(width: int, height: int, expected: int) -> None:
    assert pan_and_scan_crops(ImageSize(width, height), 256, 4, 1.2) == expected


@ANY_SIZE
@given(SIZES, st.sampled_from([(256, 4, 1.2), (64, 16, 1.0), (100, 1, 2.0)]))
def test_crops_are_those_that_hugging_face_cuts(size: ImageSize, setting: tuple[int, int, float]) -> None:
    expected = Gemma3ImageProcessorPil().pan_and_scan(pixels(size), *setting)
    assert pan_and_scan_crops(size, *setting) == len(expected)


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns", "expected"),
    [
        (640, 480, 48, 48, (36, 48)),
        (480, 640, 48, 48, (48, 36)),
        (100, 100, 24, 24, (24, 24)),
        (1000, 20, 24, 72, (2, 72)),
    ],
)
def test_padding_of_llava_next_is_left_out(
    width: int, height: int, rows: int, columns: int, expected: tuple[int, int]
) -> None:
    assert unpadded(ImageSize(width, height), rows, columns) == expected


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [(81, 81, (81, 81)), (85, 85, (85, 85)), (162, 162, (81, 81))],
)
def test_features_beyond_nine_tiles_are_shrunk(rows: int, columns: int, expected: tuple[int, int]) -> None:
    assert shrunk(rows, columns, 9 * 27 * 27) == expected


@ANY_SIZE
@given(size=SIZES)
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tokens_of_tiles_are_those_that_hugging_face_counts(
    family: str, size: ImageSize, renderer_of: RendererOf
) -> None:
    ours = renderer_of(family).family
    assert isinstance(ours, LlavaNext)
    own: Any = LlavaNextProcessor if family == "llava_next" else LlavaOnevisionProcessor
    processor: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in ours.grids]),
        patch_size=14,
        num_additional_image_tokens=0,
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
        _get_unpadded_features=lambda *sides: own._get_unpadded_features(processor, *sides),
    )
    expected = own._get_number_of_features(processor, size.height, size.width, ours.side, ours.side)
    assert len(ours.replacement(size).token_ids) == expected


@pytest.mark.parametrize(
    ("before", "between", "after", "expected", "places"),
    [
        ([], [], [], [2, 9, 4, 9, 2], [(0, 3), (3, 2)]),
        ([7], [7], [7], [7, 2, 9, 2, 7, 2, 9, 2, 7], [(1, 3), (5, 3)]),
        ([7, 1], [1], [1, 7], [7, 3, 9, 2, 3, 9, 3, 7], [(1, 3), (4, 3)]),
        ([2], [2], [2], [4, 9, 4, 2, 9, 4], [(0, 3), (3, 3)]),
        ([3], [3], [3], [3, 2, 9, 2, 3, 2, 9, 2, 3], [(1, 3), (5, 3)]),
        ([4, 1], [4], [4], [4, 3, 9, 2, 4, 2, 9, 2, 4], [(1, 3), (5, 3)]),
    ],
)
def test_newlines_of_gemma3_merge_across_an_images_ends(
    before: list[int], between: list[int], after: list[int], expected: list[int], places: list[tuple[int, int]]
) -> None:
    mask = (False, True, False)
    image = [2, 9, 2]
    first = PlaceholderRange(len(before), 3, mask)
    second = PlaceholderRange(len(before) + 3 + len(between), 3, mask)
    ids, ranges = merge_newlines([*before, *image, *between, *image, *after], (first, second), (1, 2, 3, 4))
    assert ids == expected
    assert [(place.offset, place.length) for place in ranges] == places
    assert [ids[place.offset + place.embed_mask.index(True)] for place in ranges if place.embed_mask] == [9, 9]


def test_token_ids_without_an_image_pass_unchanged(renderer_of: RendererOf) -> None:
    renderer = renderer_of("gemma3")
    family = renderer.family
    assert isinstance(family, Gemma3)
    one, two, *_ = family.newlines
    ids = (one, two, one, 5, two, two)
    assert family.place(ids, (), "prompt")[0] == list(ids)
    (prompt,) = renderer.render_completion(CompletionRequest((ids,)))
    assert prompt.token_ids == ids

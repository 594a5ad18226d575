"""Sizes against Hugging Face's own arithmetic, and by table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from renderer.prompt import ImageSize
from renderer.resize import smart_resize

QWEN_BOUNDS = (56 * 56, 14 * 14 * 4 * 1280)


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((640, 480), QWEN_BOUNDS, (644, 476)),
        ((1280, 720), QWEN_BOUNDS, (1288, 728)),
        ((1920, 1080), QWEN_BOUNDS, (1316, 728)),
        ((1, 1), QWEN_BOUNDS, (56, 56)),
        ((28, 28), QWEN_BOUNDS, (56, 56)),
        ((1, 100), QWEN_BOUNDS, (28, 560)),
        ((4096, 3072), QWEN_BOUNDS, (1148, 840)),
        ((640, 480), (12544, 200704), (504, 364)),
        ((64, 64), (12544, 200704), (112, 112)),
        ((1280, 960), (12544, 200704), (504, 364)),
        # Ties go to the even multiple.
        ((42, 70), (1, 10**9), (56, 56)),
        # A side never falls below the factor, whatever the upper bound.
        ((2000, 20), (1, 28 * 28), (280, 28)),
    ],
)
def test_smart_resize_table(size: tuple[int, int], bounds: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(ImageSize(*size), 28, *bounds) == ImageSize(*expected)


sides = st.one_of(st.integers(1, 100), st.integers(1, 9000))


@given(sides, sides, st.sampled_from([28, 32]), st.integers(1, 10**6), st.integers(0, 10**7))
def test_smart_resize_is_hugging_faces(width: int, height: int, factor: int, least: int, more: int) -> None:
    bounds = (least, least + more)
    try:
        rows, columns = hf_smart_resize(height, width, factor, *bounds)
    except ValueError:
        with pytest.raises(ValueError, match="ratio"):
            smart_resize(ImageSize(width, height), factor, *bounds)
    else:
        assert smart_resize(ImageSize(width, height), factor, *bounds) == ImageSize(columns, rows)


def test_a_side_200_times_the_other_is_the_limit() -> None:
    assert smart_resize(ImageSize(1, 200), 28, *QWEN_BOUNDS).height > 0
    with pytest.raises(ValueError, match="ratio of 201"):
        smart_resize(ImageSize(1, 201), 28, *QWEN_BOUNDS)

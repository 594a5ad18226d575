"""A glance gives the size that is stored, or nothing, whatever the file holds, and in next to no time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from renderer.image_glance import glance
from renderer.prompt import ImageSize
from tests.renderer.builders import encoded, picture
from tests.renderer.test_image_structure import HOSTILE

SIZE = ImageSize(331, 57)
PICTURE = picture(331, 57)
FILES = {
    "jpg": encoded(PICTURE, "JPEG", exif=b"Exif\0\0II*\0" + bytes(9), icc_profile=bytes(150_000)),
    "progressive.jpg": encoded(PICTURE, "JPEG", progressive=True),
    "png": encoded(PICTURE),
    "gif": encoded(PICTURE, "GIF"),
    "webp": encoded(PICTURE, "WEBP"),
    "lossless.webp": encoded(PICTURE, "WEBP", lossless=True),
    "transparent.webp": encoded(PICTURE.convert("RGBA"), "WEBP"),
    "animated.webp": encoded(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_glance_gives_the_size_that_is_stored(name: str) -> None:
    assert glance(FILES[name]) == SIZE


@pytest.mark.parametrize("form", ["TIFF", "BMP", "PPM"])
def test_a_glance_gives_nothing_for_formats_that_it_does_not_know(form: str) -> None:
    assert glance(encoded(PICTURE, form)) is None


@given(st.sampled_from(sorted(FILES)), st.integers(0, 400), st.binary(max_size=40))
def test_a_glance_at_a_damaged_file_gives_a_size_or_nothing(name: str, length: int, more: bytes) -> None:
    assert isinstance(glance(FILES[name][:length] + more), ImageSize | None)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_glance_takes_next_to_no_time(name: str) -> None:
    data = HOSTILE[name]()
    start = time.process_time()
    for _ in range(10):
        glance(data)
    assert time.process_time() - start < 10 * 0.001

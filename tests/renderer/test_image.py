"""Headers tell without pixels what decoding gives; decoding gives upright RGB over white."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from renderer.errors import MediaError
from renderer.image import FORMATS, ImageLimits, decode, read_header
from renderer.prompt import ImageSize
from tests.renderer.builders import LIMITS, encoded, picture

BASE = picture(40, 24)
GRAY = BASE.convert("L")


def with_alpha(mode: str) -> Image.Image:
    image = BASE.convert("RGBA")
    image.putalpha(GRAY)
    return image.convert(mode)


def turned(orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(BASE, form, exif=exif)


def png_with_exif_after_the_pixels(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    body = exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    plain = encoded(BASE, "PNG")
    return plain[:-12] + chunk + plain[-12:]


FILES: dict[str, bytes] = {
    "rgb.png": encoded(BASE),
    "rgb.jpg": encoded(BASE, "JPEG"),
    "progressive.jpg": encoded(BASE, "JPEG", progressive=True),
    "rgb.webp": encoded(BASE, "WEBP"),
    "rgb.bmp": encoded(BASE, "BMP"),
    "rgb.tif": encoded(BASE, "TIFF"),
    "rgb.ppm": encoded(BASE, "PPM"),
    "rgb.gif": encoded(BASE, "GIF"),
    "gray.png": encoded(GRAY),
    "gray.jpg": encoded(GRAY, "JPEG"),
    "bit.png": encoded(BASE.convert("1")),
    "sixteen.png": encoded(Image.fromarray(np.arange(40 * 24, dtype=np.uint16).reshape(24, 40) * 60)),
    "cmyk.jpg": encoded(BASE.convert("CMYK"), "JPEG"),
    "rgba.png": encoded(with_alpha("RGBA")),
    "rgba.webp": encoded(with_alpha("RGBA"), "WEBP", lossless=True),
    "la.png": encoded(with_alpha("LA")),
    "palette.png": encoded(BASE.convert("P")),
    "transparent.gif": encoded(BASE.convert("P"), "GIF", transparency=3),
    "transparent-palette.png": encoded(BASE.convert("P"), "PNG", transparency=3),
    "transparent-gray.png": encoded(GRAY, "PNG", transparency=int(np.asarray(GRAY)[0, 0])),
    "colour-key.png": encoded(BASE, "PNG", transparency=BASE.getpixel((0, 0))),
    "animated.gif": encoded(BASE, "GIF", save_all=True, append_images=[GRAY.convert("RGB")]),
    "animated.webp": encoded(BASE, "WEBP", save_all=True, append_images=[GRAY.convert("RGB")]),
    "two-pictures.mpo": encoded(BASE, "MPO", save_all=True, append_images=[GRAY.convert("RGB")]),
    "cmyk.tif": encoded(BASE.convert("CMYK"), "TIFF"),
    "lab.tif": encoded(BASE.convert("LAB"), "TIFF"),
    "sixteen.tif": encoded(Image.fromarray(np.arange(40 * 24, dtype=np.uint16).reshape(24, 40) * 60), "TIFF"),
    "float.tif": encoded(Image.fromarray(np.linspace(0, 255, 40 * 24, dtype=np.float32).reshape(24, 40)), "TIFF"),
    "animated.png": encoded(BASE, "PNG", save_all=True, append_images=[GRAY.convert("RGB")]),
    "one-pixel.png": encoded(picture(1, 1)),
    "late-exif.png": png_with_exif_after_the_pixels(6),
    **{f"turned-{turn}.jpg": turned(turn, "JPEG") for turn in range(1, 9)},
    **{f"turned-{turn}.{form.lower()}": turned(turn, form) for turn in (3, 6) for form in ("PNG", "WEBP", "TIFF")},
}
if "AVIF" in FORMATS:
    FILES["rgb.avif"] = encoded(BASE, "AVIF")
    FILES["rgba.avif"] = encoded(with_alpha("RGBA"), "AVIF")
    FILES["turned-6.avif"] = turned(6, "AVIF")
if "JPEG2000" in FORMATS:
    FILES["rgb.jp2"] = encoded(BASE, "JPEG2000")


def plainly_decoded(data: bytes) -> Any:
    """The rule in Pillow's own words: upright, then RGB, transparency over white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image is not None
    if image.mode != "RGB" and ("transparency" in image.info or image.mode in ("RGBA", "LA", "PA")):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", FILES)
def test_a_header_gives_the_size_and_decoding_the_pixels_of_what_is_shown(name: str) -> None:
    data = FILES[name]
    header = read_header(data, 0, LIMITS)
    pixels = decode(data, header, 0)
    expected = plainly_decoded(data)
    assert header.size == ImageSize(expected.shape[1], expected.shape[0])
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    # Pillow's two ways to lay a picture over white round differently.
    tolerance = 1 if "rgba" in name or "la." in name else 0
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "converted"),
    [("rgb.png", False), ("turned-6.jpg", False), ("colour-key.png", False), ("gray.png", True), ("rgba.png", True),
     ("cmyk.jpg", True), ("palette.png", True)],
)  # fmt: skip
def test_what_is_not_rgb_is_converted(name: str, converted: bool) -> None:
    assert read_header(FILES[name], 0, LIMITS).converted == converted


def test_fully_transparent_is_white() -> None:
    data = encoded(Image.new("RGBA", (3, 2), (10, 20, 30, 0)))
    assert (decode(data, read_header(data, 0, LIMITS), 0) == 255).all()


@pytest.mark.parametrize("name", ["rgb.jpg", "rgb.png", "turned-6.jpg", "rgb.webp"])
def test_a_header_is_read_from_a_file_that_is_cut_off_in_its_pixels(name: str) -> None:
    data = FILES[name]
    cut = data if name == "rgb.webp" else data[: len(data) - len(data) // 4]
    header = read_header(cut, 0, LIMITS)
    assert header == read_header(data, 0, LIMITS)
    if cut != data:
        with pytest.raises(MediaError):
            decode(cut, header, 5)


def test_a_png_header_with_a_late_orientation_decodes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(image: Image.Image) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
    assert read_header(FILES["late-exif.png"], 0, LIMITS).orientation == 6


def test_pixels_of_another_size_than_the_header_gave_are_refused() -> None:
    with pytest.raises(MediaError, match="not of the size"):
        decode(FILES["rgb.png"], read_header(FILES["one-pixel.png"], 0, LIMITS), 0)


@pytest.mark.parametrize("form", ["ICO", "TGA", "PCX", "SGI", "DDS", "ICNS", "QOI"])
def test_a_rarer_format_is_refused_and_those_that_are_taken_are_named(form: str) -> None:
    with pytest.raises(MediaError, match=r"known format \(JPEG, PNG, WEBP, GIF, BMP, TIFF,"):
        read_header(encoded(BASE, form), 0, LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        b"no image at all",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.4",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_what_is_no_still_image_is_the_callers_fault(data: bytes) -> None:
    with pytest.raises(MediaError, match="known format") as caught:
        read_header(data, 4, LIMITS)
    assert caught.value.index == 4
    assert caught.value.status == 400


def test_an_image_beyond_the_limits_is_refused_before_it_is_decoded() -> None:
    data = FILES["rgb.png"]
    with pytest.raises(MediaError, match="40 x 24 pixels, more than 959"):
        read_header(data, 0, ImageLimits(10**6, 40 * 24 - 1))
    with pytest.raises(MediaError, match="bytes, more than"):
        read_header(data, 0, ImageLimits(len(data) - 1, 10**6))
    assert read_header(data, 0, ImageLimits(len(data), 40 * 24)).size == ImageSize(40, 24)


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"\x00\x00\x00\x0dIHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IDAT5\xaf\x06\x1e"


@pytest.mark.parametrize("side", [10_000, 65_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(MediaError):
        read_header(bomb(side, side), 0, LIMITS)


def damaged(data: bytes, change: Callable[[bytearray], None]) -> None:
    broken = bytearray(data)
    change(broken)
    try:
        header = read_header(bytes(broken), 0, LIMITS)
        assert decode(bytes(broken), header, 0).shape == (header.size.height, header.size.width, 3)
    except MediaError:
        pass


@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8))
def test_a_damaged_image_is_decoded_or_the_callers_fault(name: str, changes: list[tuple[int, int]]) -> None:
    def change(data: bytearray) -> None:
        for place, byte in changes:
            data[place % len(data)] = byte

    damaged(FILES[name], change)


@given(st.sampled_from(sorted(FILES)), st.integers(0, 10**6))
def test_a_cut_off_image_is_decoded_or_the_callers_fault(name: str, length: int) -> None:
    def cut(data: bytearray) -> None:
        del data[length % len(data) :]

    damaged(FILES[name], cut)

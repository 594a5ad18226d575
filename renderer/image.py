"""Encoded images: what their headers say, and their pixels as RGB."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from renderer.errors import MediaError
from renderer.image_structure import (
    PNG_SIGNATURE,
    MeteredFile,
    TooManyPartsError,
    check_exif,
    check_structure,
    png_header,
)
from renderer.prompt import ImageSize

if TYPE_CHECKING:
    from renderer.pixels import Pixels

# Still-image formats that Pillow decodes in this process and whose headers give the decoded size and mode.
_PLUGINS = {
    "JPEG": "Jpeg",
    "PNG": "Png",
    "WEBP": "WebP",
    "GIF": "Gif",
    "BMP": "Bmp",
    "TIFF": "Tiff",
    "AVIF": "Avif",
    "JPEG2000": "Jpeg2K",
    "PPM": "Ppm",
}
for _plugin in _PLUGINS.values():
    import_module(f"PIL.{_plugin}ImagePlugin")
FORMATS = tuple(name for name in _PLUGINS if name in Image.OPEN)

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAPPED = (5, 6, 7, 8)
_WHITE = (255, 255, 255)
_EXIF_AS_TEXT = "Raw profile type exif"


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may measure: bytes encoded, pixels decoded."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What is known of an image before a pixel is decoded.

    Attributes:
        size: As shown, with `orientation` applied.
        mode: Pillow's mode of the file's pixels.
        orientation: EXIF orientation, 1-8; 1 is upright.
    """

    size: ImageSize
    mode: str
    orientation: int

    @property
    def converted(self) -> bool:
        """Whether its pixels are something else than RGB and get converted."""
        return self.mode != "RGB"


def read_header(data: bytes, index: int, limits: ImageLimits) -> ImageHeader:
    """Read an encoded image's header.

    Raises:
        MediaError: It is not an image of a known format, or beyond the limits, or its header would take long to read.
    """
    if len(data) > limits.max_bytes:
        raise MediaError(f"it has {len(data)} bytes, more than {limits.max_bytes}", index)
    with _decoding(index), _opened(data) as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise MediaError(f"it has {width} x {height} pixels, more than {limits.max_pixels}", index)
        orientation = _orientation(image)
        if orientation in _SIDES_SWAPPED:
            width, height = height, width
        return ImageHeader(ImageSize(width, height), image.mode, orientation)


def decode(data: bytes, header: ImageHeader, index: int) -> Pixels:
    """Decode an image: first frame, upright, transparency over white, uint8 [height, width, 3], read-only.

    Raises:
        MediaError: It is truncated or corrupt.
    """
    with _decoding(index), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()
        rgb = _to_rgb(image)
        if header.orientation in _TRANSPOSE:
            rgb = rgb.transpose(_TRANSPOSE[header.orientation])
        if rgb.size != (header.size.width, header.size.height):
            raise MediaError("its pixels are not of the size that its header gives", index)
        return np.asarray(rgb)


@contextmanager
def _decoding(index: int) -> Iterator[None]:
    """Turn whatever a decoder raises on bytes that are no sound image into the caller's error."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"it is not an image of a known format ({', '.join(FORMATS)})", index) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError("it has too many pixels", index) from error
    except TooManyPartsError as error:
        raise MediaError(str(error), index) from error
    except Exception as error:
        raise MediaError(f"it cannot be decoded: {error}", index) from error


def _opened(data: bytes) -> Image.Image:
    """The file, of which only the header is read."""
    check_structure(data)
    if data[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"):
        check_exif(_avif_exif(data))
    header = png_header(data) if data.startswith(PNG_SIGNATURE) else data
    return Image.open(MeteredFile(header), formats=FORMATS)


def _avif_exif(data: bytes) -> bytes:
    """EXIF data that Pillow interprets while it opens the file."""
    try:
        exif: bytes | None = import_module("PIL._avif").AvifDecoder(data, "auto", 1).get_info()[4]
    except Exception:  # Opening it tells what is wrong.
        return b""
    return exif or b""


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow applies it itself, and gives the size after it.
        return 1
    try:
        _check_exif(image.info)
        # The method of the base class: PNG's own would decode the pixels to reach chunks that follow them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except TooManyPartsError:
        raise
    except Exception:  # Malformed EXIF data leave the image as it is stored.
        return 1
    return value if value in _TRANSPOSE else 1


def _check_exif(info: dict[str | tuple[int, int], Any]) -> None:
    """Check the EXIF data of an opened file; those that a PNG holds as text are put where others are."""
    if "exif" not in info and _EXIF_AS_TEXT in info:
        info["exif"] = bytes.fromhex("".join(info[_EXIF_AS_TEXT].split("\n")[3:]))
    check_exif(info.get("exif", b""))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    transparent = image if image.mode == "RGBA" else image.convert("RGBA")
    over_white = Image.new("RGB", image.size, _WHITE)
    over_white.paste(transparent, mask=transparent.getchannel("A"))
    return over_white

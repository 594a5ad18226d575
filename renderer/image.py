"""Encoded images: what their headers say, and their pixels as RGB."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from renderer.errors import MediaError
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
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may measure: bytes encoded, pixels decoded."""

    max_bytes: int
    max_pixels: int


# Pillow joins a JPEG's EXIF segments, each to all before it: a large file of small ones would take minutes to open.
_JPEG, _EXIF = b"\xff\xd8", b"Exif\0\0"
_MAX_EXIF = 16
_SMALL_BYTES = 1 << 20


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
        MediaError: It is not an image of a known format, or beyond the limits.
    """
    if len(data) > limits.max_bytes:
        raise MediaError(f"it has {len(data)} bytes, more than {limits.max_bytes}", index)
    if len(data) > _SMALL_BYTES and data.startswith(_JPEG) and data.count(_EXIF) > _MAX_EXIF:
        raise MediaError(f"it has more than {_MAX_EXIF} EXIF segments", index)
    with _decoding(index), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise MediaError(f"it has {width} x {height} pixels, more than {limits.max_pixels}", index)
        orientation = _orientation(image, data)
        if orientation in _SIDES_SWAPPED:
            width, height = height, width
        return ImageHeader(ImageSize(width, height), image.mode, orientation)


def decode(data: bytes, header: ImageHeader, index: int) -> Pixels:
    """Decode an image: first frame, upright, transparency over white, uint8 [height, width, 3].

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
        return np.array(rgb)


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
    except Exception as error:
        raise MediaError(f"it cannot be decoded: {error}", index) from error


def _orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "TIFF":  # Pillow applies it itself, and gives the size after it.
        return 1
    try:
        source = image
        if image.format == "PNG" and "exif" not in image.info:
            source = Image.open(io.BytesIO(_png_without_pixels(data)), formats=("PNG",))
        # The method of the base class: PNG's own would decode the pixels to reach chunks that follow them.
        value = Image.Image.getexif(source).get(ExifTags.Base.Orientation, 1)
    except Exception:  # Malformed EXIF data leave the image as it is stored.
        return 1
    return value if value in _TRANSPOSE else 1


def _png_without_pixels(data: bytes) -> bytes:
    """The chunks of a PNG but for its pixels: EXIF data may stand after these."""
    kept = [_PNG_SIGNATURE]
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind != b"IDAT":
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, _PNG_END])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    transparent = image if image.mode == "RGBA" else image.convert("RGBA")
    over_white = Image.new("RGB", image.size, _WHITE)
    over_white.paste(transparent, mask=transparent.getchannel("A"))
    return over_white

"""Pictures drawn in memory: the same pixels and the same encoded bytes every time, under one version of Pillow.

A picture has a name, which says all about it: `rgb-640x480.png` is a photograph-like drawing of that size in that
mode and format; `FORMS` holds those that need more than that.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_EXIF_ORIENTATION = 0x0112
_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "avif": "AVIF", "bmp": "BMP", "tif": "TIFF"}


@cache
def picture(name: str) -> bytes:
    """The encoded file of that name."""
    if name in FORMS:
        return FORMS[name]()
    stem, extension = name.rsplit(".", 1)
    mode, size = stem.split("-")
    width, height = (int(side) for side in size.split("x"))
    image = drawing(width, height)
    return _encoded(image if mode == "rgb" else image.convert(_MODES[mode]), extension)


def drawing(width: int, height: int) -> Image.Image:
    """A slow gradient, a disc and a stripe with hard edges, and grain: something for every filter to show itself on."""
    down, across = np.mgrid[0:height, 0:width].astype(np.float32)
    down, across = down / max(height, 2), across / max(width, 2)
    channels = np.stack([255 * across, 255 * down, 127.5 * (2 - across - down)], axis=-1)
    disc = (across - 0.4) ** 2 + (down - 0.5) ** 2 < 0.06
    channels[disc] = (225, 30, 40)
    channels[(across * 7 + down * 3) % 1 < 0.12] = (20, 60, 200)
    channels += _grain(height, width)
    return Image.fromarray(np.clip(np.rint(channels), 0, 255).astype(np.uint8))


def _grain(height: int, width: int) -> NDArray[np.float32]:
    """Repeatable noise in [-24, 24), by hashing positions: no generator whose stream might change."""
    position = np.arange(height * width, dtype=np.uint32)
    mixed = (position ^ (position >> np.uint32(7))) * np.uint32(2654435761)
    mixed ^= mixed >> np.uint32(15)
    noise = (mixed % np.uint32(48)).astype(np.float32) - 24
    return noise.reshape(height, width, 1)


def _encoded(image: Image.Image, extension: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, _FORMATS[extension], **options)
    return file.getvalue()


def _with_alpha(image: Image.Image) -> Image.Image:
    """Opaque at the left, transparent at the right."""
    alpha = np.linspace(255, 0, image.width).astype(np.uint8)
    image.putalpha(Image.fromarray(np.broadcast_to(alpha, (image.height, image.width)).copy()))
    return image


def _turned(orientation: int, extension: str) -> bytes:
    image = drawing(160, 90)
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = orientation
    return _encoded(image, extension, exif=exif)


def _sixteen_bit() -> bytes:
    values = np.asarray(drawing(120, 80).convert("L")).astype(np.uint16) * 257
    return _encoded(Image.fromarray(values), "png")


def _palette(transparent: bool) -> bytes:
    image = drawing(120, 80).quantize(32, dither=Image.Dither.NONE)
    return _encoded(image, "png", **({"transparency": 3} if transparent else {}))


def _colour_key() -> bytes:
    image = drawing(120, 80)
    red, green, blue = np.asarray(image)[40, 20]
    return _encoded(image, "png", transparency=(int(red), int(green), int(blue)))


def _animated(extension: str) -> bytes:
    first, second = drawing(120, 80), drawing(120, 80).transpose(Image.Transpose.ROTATE_180)
    return _encoded(first, extension, save_all=True, append_images=[second], duration=100)


_MODES = {"gray": "L", "bit": "1", "cmyk": "CMYK", "rgba": "RGBA"}
FORMS: dict[str, Callable[[], bytes]] = {
    "alpha.png": lambda: _encoded(_with_alpha(drawing(120, 80)), "png"),
    "alpha.webp": lambda: _encoded(_with_alpha(drawing(120, 80)), "webp", lossless=True),
    "gray-alpha.png": lambda: _encoded(_with_alpha(drawing(120, 80).convert("L")), "png"),
    "palette.png": lambda: _palette(transparent=False),
    "palette-transparent.png": lambda: _palette(transparent=True),
    "colour-key.png": _colour_key,
    "gray-16-bit.png": _sixteen_bit,
    "progressive.jpg": lambda: _encoded(drawing(120, 80), "jpg", progressive=True, quality=85),
    "full-chroma.jpg": lambda: _encoded(drawing(120, 80), "jpg", subsampling=0, quality=95),
    "lossless.webp": lambda: _encoded(drawing(120, 80), "webp", lossless=True),
    "animated.gif": lambda: _animated("gif"),
    "animated.webp": lambda: _animated("webp"),
    "animated.png": lambda: _animated("png"),
    "turned-3.jpg": lambda: _turned(3, "jpg"),
    "turned-5.jpg": lambda: _turned(5, "jpg"),
    "turned-6.jpg": lambda: _turned(6, "jpg"),
    "turned-6.png": lambda: _turned(6, "png"),
    "turned-8.webp": lambda: _turned(8, "webp"),
    "truncated.jpg": lambda: picture("rgb-120x80.jpg")[:-600],
    "truncated.png": lambda: picture("rgb-120x80.png")[:-600],
    "words.png": lambda: b"this is no picture at all",
    "empty.png": lambda: b"",
}  # fmt: skip

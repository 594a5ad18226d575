"""The size of an image by its first bytes, for whoever only estimates how much work it is."""

from __future__ import annotations

import struct

from renderer.image_structure import PNG_SIGNATURE
from renderer.prompt import ImageSize

_MAX_SEGMENTS = 32
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)


def glance(data: bytes) -> ImageSize | None:
    """The size as stored, unchecked, in microseconds whatever the file; None where it does not stand at the beginning.

    JPEG, PNG, WebP, GIF.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(PNG_SIGNATURE):
            return ImageSize(*struct.unpack_from(">II", data, 16))
        if data.startswith((b"GIF87a", b"GIF89a")):
            return ImageSize(*struct.unpack_from("<HH", data, 6))
        if data.startswith(b"RIFF"):
            return _webp(data)
    except struct.error:  # cut off
        pass
    return None


def _jpeg(data: bytes) -> ImageSize | None:
    position = 2
    for _ in range(_MAX_SEGMENTS):
        marker, length, height, width = struct.unpack_from(">HHxHH", data, position)
        if marker >> 8 != 0xFF:
            return None
        if marker & 0xFF in _FRAMES:
            return ImageSize(width, height)
        position += 2 + length
    return None


def _webp(data: bytes) -> ImageSize | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageSize(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageSize((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (24, 27))
        return ImageSize(width, height)
    return None

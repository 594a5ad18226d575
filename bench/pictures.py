"""Pictures that compress as photographs do, the same bytes every time, and the requests that carry them."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pybase64
from PIL import Image

# Waves across the picture, and how strongly they vary: more detail is fainter, as in photographs.
_DETAIL = ((8, 60), (32, 35), (128, 14), (512, 6))
_QUALITY = 85
WORDS = "the green room is where performers wait and warm up before they walk out into the light of the stage "


@cache
def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG of 1.1 to 1.7 bits a pixel."""
    noise = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.float32)
    for across, spread in _DETAIL:
        coarse = noise.normal(0, spread, (3, max(2, across * height // width), across)).astype(np.float32)
        for channel, waves in enumerate(coarse):
            pixels[..., channel] += np.asarray(Image.fromarray(waves).resize((width, height), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def unlike(picture: bytes, number: int) -> bytes:
    """The same picture under another hash: bytes that no decoder reads follow its end."""
    return picture + number.to_bytes(8, "little")


def data_url(picture: bytes) -> str:
    return "data:image/jpeg;base64," + pybase64.b64encode(picture).decode()


def sentence(words: int) -> str:
    """English text of so many words."""
    repeated = (WORDS * (words // len(WORDS.split()) + 1)).split()
    return " ".join(repeated[:words])

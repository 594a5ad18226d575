"""What each stage of the way from an encoded image to its tensors, and to the wire, costs on one thread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from bench.measure import thread_ms
from bench.pictures import photograph
from renderer.image import ImageLimits, decode, read_header
from renderer.renderer import Renderer
from renderer.wire import encode_item

SIZES = ((640, 480), (1280, 720), (1920, 1080))
_LIMITS = ImageLimits(1 << 30, 1 << 30)


def pixel_path(renderer: Renderer, turns: int) -> list[dict[str, Any]]:
    """Milliseconds of the thread's processor time, medians of stages that take turns.

    "JPEG to tensors" is decoding and the family's tensors, without what lies around them.
    """
    rows = []
    for width, height in SIZES:
        stages = _stages(renderer, photograph(width, height))
        samples: dict[str, list[float]] = {name: [] for name in stages}
        for turn in range(-2, turns):
            for name, stage in stages.items():
                taken = thread_ms(stage)()
                if turn >= 0:
                    samples[name].append(taken)
        medians = {name: statistics.median(taken) for name, taken in samples.items()}
        rows.append({"image": f"{width}x{height}", **medians})
    return rows


def _stages(renderer: Renderer, picture: bytes) -> Mapping[str, Callable[[], object]]:
    family = renderer.family
    header = read_header(picture, 0, _LIMITS)
    pixels = decode(picture, header, 0)
    tensors = family.tensors(pixels)
    return {
        "header": lambda: read_header(picture, 0, _LIMITS),
        "decode": lambda: decode(picture, header, 0),
        "tensors": lambda: family.tensors(pixels),
        "JPEG to tensors": lambda: family.tensors(decode(picture, header, 0)),
        "to the wire": lambda: encode_item(tensors, family.fields, renderer.float_type),
    }

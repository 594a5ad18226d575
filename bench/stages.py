"""What each stage of the way from an encoded image to its tensors, and to the wire, costs on one thread."""

from __future__ import annotations

import cProfile
import statistics
import time
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

from bench.measure import thread_ms
from bench.pictures import photograph
from renderer import pixels as paths
from renderer.base64_parts import base64_parts
from renderer.families.hf_processor import TorchvisionArithmetic
from renderer.image import ImageLimits, decode, read_header
from renderer.renderer import Renderer
from renderer.wire import item_parts

SIZES = ((640, 480), (1280, 720), (1920, 1080))
_LIMITS = ImageLimits(1 << 30, 1 << 30)
# Steps within a family's tensors. "copy" takes the channels apart; what is no step is Hugging Face's own class around
# them: padding, stacking, checks.
_STEPS: Mapping[CodeType, str] = {
    paths.resized.__code__: "resize",
    paths.planes.__code__: "copy",
    paths.normalised.__code__: "normalise",
    TorchvisionArithmetic.rescale.__code__: "normalise",
    TorchvisionArithmetic.normalize.__code__: "normalise",
    paths.patches.__code__: "patch",
}


def pixel_path(renderer: Renderer, turns: int) -> list[dict[str, Any]]:
    """Milliseconds of the thread's processor time, medians of stages that take turns.

    "JPEG to tensors" is decoding and the family's tensors, without what lies around them; the columns from "resize" to
    "rest" are what "tensors" consists of, in runs of their own under a profiler.
    """
    rows = []
    for width, height in SIZES:
        stages = _stages(renderer, photograph(width, height))
        samples: dict[str, list[float]] = {}
        for turn in range(-2, turns):
            for stage in stages:
                for name, taken in stage().items():
                    samples.setdefault(name, []).extend([taken] if turn >= 0 else [])
        medians = {name: statistics.median(taken) for name, taken in samples.items()}
        rows.append({"image": f"{width}x{height}", **medians})
    return rows


def _stages(renderer: Renderer, picture: bytes) -> list[Callable[[], dict[str, float]]]:
    family = renderer.family
    header = read_header(picture, 0, _LIMITS)
    pixels = decode(picture, header, 0)
    tensors = family.tensors(pixels)
    parts = list(item_parts(tensors, family.fields, renderer.float_type))
    return [
        _named("header", lambda: read_header(picture, 0, _LIMITS)),
        _named("decode", lambda: decode(picture, header, 0)),
        lambda: _steps(lambda: family.tensors(pixels)),
        _named("tensors", lambda: family.tensors(pixels)),
        _named("JPEG to tensors", lambda: family.tensors(decode(picture, header, 0))),
        _named("encode", lambda: list(item_parts(tensors, family.fields, renderer.float_type))),
        _named("base64", lambda: list(base64_parts(parts))),
    ]


def _named(name: str, fn: Callable[[], object]) -> Callable[[], dict[str, float]]:
    run = thread_ms(fn)
    return lambda: {name: run()}


def _steps(fn: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of every step in a run of `fn`, without the steps within it, and of the rest."""
    profile = cProfile.Profile(time.thread_time, builtins=False)
    whole = thread_ms(lambda: profile.runcall(fn))()
    spent = dict.fromkeys(_STEPS.values(), 0.0)
    for entry in profile.getstats():
        step = _STEPS.get(entry.code) if isinstance(entry.code, CodeType) else None
        if step is not None:
            within = sum(inner.totaltime for inner in entry.calls or () if inner.code in _STEPS)
            spent[step] += (entry.totaltime - within) * 1e3
    return {**spent, "rest": whole - sum(spent.values())}

"""Pictures, requests and renderers for the tests of `renderer/`."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from renderer.caches import SenderCache
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, ImagePart, Message, Part, TextPart
from renderer.image import ImageLimits
from renderer.renderer import Renderer

DEMO = Path(__file__).parents[2] / "demo" / "model"
LIMITS = ImageLimits(max_bytes=32 * 1024 * 1024, max_pixels=64_000_000)


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A noisy RGB picture, the same for the same arguments."""
    rng = np.random.default_rng([width, height, seed])
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@cache
def photo(width: int = 96, height: int = 64, seed: int = 0, form: str = "PNG") -> bytes:
    return encoded(picture(width, height, seed), form)


def image_part(seed: int = 0, uuid: str | None = None) -> ImagePart:
    return ImagePart(data=photo(seed=seed), uuid=uuid)


def user(*parts: Part | str) -> Message:
    return Message("user", tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def chat(*parts: Part | str, **options: Any) -> ChatRequest:
    return ChatRequest((user(*parts),), **options)


def demo_renderer(sender_cache: SenderCache | None = None, **config: Any) -> Renderer:
    """A renderer of the demo model; the caller closes it."""
    return Renderer(RendererConfig(model=str(DEMO), **config), sender_cache)

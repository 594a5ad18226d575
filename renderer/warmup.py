"""Warm-up: both processors and the chat template, in every thread that serves, before anybody can reach them."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from renderer.conversation import ChatRequest, CompletionRequest, ImagePart, Message, TextPart
from renderer.errors import RequestError, WarmupError
from renderer.prompt import ImageSize

if TYPE_CHECKING:
    from renderer.processor import MultiModalProcessor
    from renderer.renderer import Renderer

logger = logging.getLogger("greenroom.renderer")

USUAL_SIZE = ImageSize(640, 480)
# The memory allocator settles on how it serves a size when that is freed and asked for again.
_ROUNDS = 3
_TEXT = "Warm-up: one sentence of plain text, some digits 0123456789, and a word beyond ASCII: naïve."


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What warm-up did.

    Attributes:
        steps: Seconds of each step.
        ended_at: Seconds since the epoch.
        failures: The reason of each step that failed, by step.
    """

    steps: Mapping[str, float]
    ended_at: float
    failures: Mapping[str, str] = field(default_factory=dict)


def warm_up(renderer: Renderer) -> WarmupReport:
    """Run every step; a failed one is logged, and the others run all the same.

    Raises:
        WarmupError: A step failed, and the configuration says `warmup: strict`.
    """
    steps: dict[str, Callable[[], None]] = {"chat template": lambda: _warmup_chat_template(renderer)}
    if renderer.modalities:
        steps["mm_processor"] = lambda: _warmup_and_clear(renderer, renderer.mm_processor, "Multi-modal")
        steps["readonly_mm_processor"] = lambda: _warmup_and_clear(
            renderer, renderer.readonly_mm_processor, "Readonly multi-modal"
        )
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, step in steps.items():
        started = time.perf_counter()
        try:
            step()
        except Exception as error:
            logger.warning("Warm-up step %r failed", name, exc_info=True)
            failures[name] = f"{type(error).__name__}: {error}"
        seconds[name] = time.perf_counter() - started
    if failures and renderer.config.warmup == "strict":
        raise WarmupError("warm-up failed: " + "; ".join(f"{name}: {reason}" for name, reason in failures.items()))
    return WarmupReport(seconds, time.time(), failures)


def _warmup_and_clear(renderer: Renderer, processor: MultiModalProcessor, log_prefix: str) -> None:
    try:
        _warmup_mm_processor(renderer, processor, log_prefix=log_prefix)
    finally:
        _clear_processor_cache(processor)


def _clear_processor_cache(processor: MultiModalProcessor | None) -> None:
    if processor is not None and processor.cache is not None:
        processor.cache.clear_cache()


def _warmup_mm_processor(renderer: Renderer, processor: MultiModalProcessor, *, log_prefix: str) -> None:
    """Process dummy images in every media thread, and render a request with each in every request thread."""
    started = time.perf_counter()
    images = _dummy_images(renderer)
    items = processor.identify([ImagePart(data=image) for image in images], None, {})
    *usual, largest = items
    for item in (largest, *usual * _ROUNDS):
        renderer.media_pool.each(partial(processor.process, item, renderer.family))

    def render() -> None:
        for image in images[:-1] * _ROUNDS:
            _render(renderer, processor, image)

    renderer.request_pool.each(render)
    logger.info("%s warmup completed in %.3fs", log_prefix, time.perf_counter() - started)


def _render(renderer: Renderer, processor: MultiModalProcessor, image: bytes) -> None:
    """A conversation with the image; the image alone where the model has none that would take it."""
    request = ChatRequest((Message("user", (ImagePart(data=image), TextPart(_TEXT))),))
    if _fits(renderer, request):
        lease = renderer.render_chat(request, skip_mm_cache=processor is renderer.readonly_mm_processor).lease
        if lease is not None:
            lease.close()
        return
    lease = processor.lease()
    try:
        processor.apply(processor.identify([ImagePart(data=image)], None, {}), renderer.family, lease)
    finally:
        if lease is not None:
            lease.close()


def _fits(renderer: Renderer, request: ChatRequest) -> bool:
    try:
        return renderer.has_chat_template and len(renderer.layout(request).token_ids) <= renderer.max_model_len
    except RequestError:
        return False


def _warmup_chat_template(renderer: Renderer) -> None:
    messages = (Message("user", (TextPart(_TEXT),)),)

    def render() -> None:
        if renderer.has_chat_template:
            renderer.layout(ChatRequest(messages))
        renderer.render_completion(CompletionRequest((_TEXT,)))

    renderer.request_pool.each(render)


def _dummy_images(renderer: Renderer) -> list[bytes]:
    """Encoded images: of a usual size in the usual formats; the last of the largest size that the model takes."""
    largest = renderer.family.largest_image(renderer.max_model_len)
    usual = _picture(USUAL_SIZE)
    return [*(_encoded(usual, form) for form in ("JPEG", "PNG", "WEBP")), _encoded(_picture(largest), "JPEG")]


def usual_image() -> bytes:
    """An encoded image of the usual size."""
    return _encoded(_picture(USUAL_SIZE), "JPEG")


def _picture(size: ImageSize) -> Image.Image:
    """A picture of gradients, which compresses as photographs do rather than to nothing."""
    x = np.linspace(0, 40, size.width, dtype=np.float32)
    y = np.linspace(0, 30, size.height, dtype=np.float32)[:, None]
    waves = [np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x) * np.cos(y)]
    return Image.fromarray((np.stack(waves, axis=-1) * 127 + 128).astype(np.uint8))


def _encoded(picture: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()

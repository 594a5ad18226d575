"""How much work a request is, before anything of it is done: seconds of rendering, from sizes alone."""

from __future__ import annotations

from deployments.autoscaling import PIXELS_PER_BYTE, render_seconds
from deployments.calls import RenderCall, Rendering, TokenizeCall, expected_media_bytes, text_bytes
from renderer.conversation import CompletionRequest, media_of
from renderer.image_glance import glance
from renderer.media import MediaItem

# An image beyond this is refused before its pixels are touched: it is no work.
MAX_PIXELS = 2**30
BYTES_PER_CHARACTER = 4


def call_seconds(call: RenderCall | TokenizeCall, headers: bool = False) -> float:
    """See `request_seconds`."""
    if isinstance(call, TokenizeCall):
        return request_seconds(call.request, decoded=False)
    return request_seconds(call.request, call.tensors, headers)


def request_seconds(request: Rendering | str, decoded: bool = True, headers: bool = False) -> float:
    """An estimate of the CPU seconds that rendering a request takes.

    Args:
        decoded: Whether pixels are touched.
        headers: Whether to glance at image headers, as the replica that does the work can; a router counts bytes.
    """
    return render_seconds(
        requests=len(request.prompts) if isinstance(request, CompletionRequest) else 1,
        pixels=_pixels(request, headers) if decoded else 0,
        media_bytes=expected_media_bytes(request),
        characters=text_bytes(request) // BYTES_PER_CHARACTER,
    )


def item_seconds(item: MediaItem) -> float:
    """An estimate of the CPU seconds that processing an item takes."""
    pixels = item.size.width * item.size.height
    return render_seconds(requests=0, pixels=pixels, media_bytes=len(item.data or b""))


def _pixels(request: Rendering | str, headers: bool) -> int:
    if not headers:
        return PIXELS_PER_BYTE * expected_media_bytes(request)
    return sum(_header_pixels(part.data) for part in media_of(request) if part.data is not None)


def _header_pixels(data: bytes) -> int:
    size = glance(data)
    pixels = PIXELS_PER_BYTE * len(data) if size is None else size.width * size.height
    return 0 if pixels > MAX_PIXELS else pixels

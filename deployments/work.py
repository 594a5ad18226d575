"""How much work a request is, before anything of it is done: seconds of rendering, from sizes alone."""

from __future__ import annotations

from deployments.autoscaling import PIXELS_PER_BYTE, render_seconds
from deployments.calls import RenderCall, Rendering, TokenizeCall, expected_media_bytes, text_bytes
from renderer.conversation import CompletionRequest, media_of
from renderer.errors import MediaError
from renderer.image import ImageLimits, read_header
from renderer.media import MediaItem

# Reading one takes up to a third of a millisecond of the event loop, and images of one request resemble each other.
HEADERS_READ = 8
# An image beyond these is refused before its pixels are touched: it is no work.
LIMITS = ImageLimits(max_bytes=2**40, max_pixels=2**30)
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
        headers: Whether to read image headers, as the replica that does the work can afford; a router counts bytes.
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
    data = [part.data for part in media_of(request) if part.data is not None]
    read = [_header_pixels(each) for each in data[:HEADERS_READ]]
    return sum(read) * len(data) // max(1, len(read))


def _header_pixels(data: bytes) -> int:
    try:
        size = read_header(data, 0, LIMITS).size
    except MediaError:
        return 0
    return size.width * size.height

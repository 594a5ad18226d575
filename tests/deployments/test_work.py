"""What a request counts as, for scaling."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from deployments.autoscaling import PIXELS_PER_BYTE, SECONDS_PER_PIXEL, render_seconds
from deployments.calls import Envelope, RenderCall, Rendering, SamplingRequest, TokenizeCall
from deployments.work import call_seconds, request_seconds
from renderer.conversation import ChatRequest, CompletionRequest, ImagePart, Message, Part, TextPart, TokensRequest


def png(width: int, height: int) -> ImagePart:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return ImagePart(data=stream.getvalue())


def chat(*parts: Part) -> ChatRequest:
    return ChatRequest((Message("user", parts),))


def size(*parts: ImagePart) -> int:
    return sum(len(part.data or b"") for part in parts)


SMALL, LARGE = png(100, 50), png(300, 200)


def test_images_count_as_their_headers_pixels() -> None:
    expected = render_seconds(pixels=100 * 50 + 300 * 200, media_bytes=size(SMALL, LARGE), characters=5)
    assert request_seconds(chat(SMALL, LARGE, TextPart("What?")), headers=True) == expected


def test_an_image_that_will_be_refused_for_its_size_is_no_work() -> None:
    data = SMALL.data or b""
    bomb = ImagePart(data=data[:16] + (65_000).to_bytes(4, "big") * 2 + data[24:])
    assert request_seconds(chat(bomb), headers=True) == render_seconds(media_bytes=size(bomb))


def test_images_whose_headers_are_not_read_count_by_their_bytes() -> None:
    expected = render_seconds(pixels=PIXELS_PER_BYTE * size(LARGE), media_bytes=size(LARGE))
    assert request_seconds(TokensRequest((), (LARGE,))) == expected


@pytest.mark.parametrize("part", [ImagePart(url="http://host/x.png"), ImagePart(uuid="x"), ImagePart(data=b"no image")])
def test_what_is_no_image_yet_costs_no_pixels(part: ImagePart) -> None:
    assert request_seconds(chat(part), headers=True) < SECONDS_PER_PIXEL * 100_000


def test_a_layout_and_a_tokenization_touch_no_pixel() -> None:
    request, expected = chat(LARGE), render_seconds(media_bytes=size(LARGE))
    call = RenderCall(request, SamplingRequest(), Envelope("id"), skip_mm_cache=True, tensors=False)
    assert call_seconds(call, headers=True) == call_seconds(TokenizeCall(request)) == expected
    assert call_seconds(RenderCall(request, SamplingRequest(), Envelope("id"), skip_mm_cache=True)) > expected


@pytest.mark.parametrize(
    ("request_", "characters"),
    [("x" * 1000, 1000), (chat(TextPart("x" * 1000)), 1000), (CompletionRequest(("x" * 1000,)), 1000)],
)
def test_text_counts_by_its_length(request_: Rendering | str, characters: int) -> None:
    assert request_seconds(request_) == render_seconds(characters=characters)


def test_every_prompt_of_a_completion_counts() -> None:
    assert request_seconds(CompletionRequest(("a", "b", "c"))) == render_seconds(requests=3, characters=3)

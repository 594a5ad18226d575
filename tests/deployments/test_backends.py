import pytest

from deployments.backends import render_crosses_by_reference
from deployments.calls import Envelope, RenderCall, Rendering, SamplingRequest
from deployments.tier_handle import BY_VALUE_BYTES, crosses_by_reference
from renderer.conversation import ChatRequest, CompletionRequest, ImagePart, Message, TextPart

SMALL, LARGE = ImagePart(bytes(1000)), ImagePart(bytes(BY_VALUE_BYTES))


def chat(*images: ImagePart, text: str = "Hello") -> ChatRequest:
    return ChatRequest((Message("user", (*images, TextPart(text))),))


@pytest.mark.parametrize(
    ("request_bytes", "answer_bytes", "tensors_back", "by_reference"),
    [
        (0, 0, False, False),
        (BY_VALUE_BYTES, 0, False, False),
        (BY_VALUE_BYTES + 1, 0, False, True),
        (0, BY_VALUE_BYTES + 1, False, True),
        (0, 0, True, True),
    ],
)
def test_a_call_crosses_by_value_unless_it_is_large(
    request_bytes: int, answer_bytes: int, tensors_back: bool, by_reference: bool
) -> None:
    assert crosses_by_reference(request_bytes, answer_bytes, tensors_back) is by_reference


@pytest.mark.parametrize(
    ("request_", "tensors", "by_reference"),
    [
        (chat(), True, False),
        (chat(SMALL), True, True),
        (chat(SMALL), False, False),
        (chat(LARGE), False, True),
        (chat(*[SMALL] * 64), False, True),
        (chat(text="x" * 10**6), False, True),
        (CompletionRequest(("a" * 1000,)), True, False),
        (CompletionRequest((tuple(range(10**5)),)), True, True),
    ],
)
def test_a_rendering_crosses_by_reference_where_tensors_come_back_or_the_tokens_are_many(
    request_: Rendering, tensors: bool, by_reference: bool
) -> None:
    call = RenderCall(request_, SamplingRequest(), Envelope("id"), True, tensors)
    assert render_crosses_by_reference(call) is by_reference

"""What a request carries."""

from __future__ import annotations

from renderer.conversation import (
    ChatRequest,
    CompletionRequest,
    FeatureItem,
    FeaturesRequest,
    ImagePart,
    Message,
    TextPart,
    TokensRequest,
    media_of,
)
from renderer.prompt import PlaceholderRange

FIRST, SECOND = ImagePart(data=b"first"), ImagePart(url="https://images.test/second.png")


def test_images_are_found_in_the_order_of_the_conversation() -> None:
    messages = (Message("user", (SECOND, TextPart("x"))), Message("assistant", "y"), Message("user", (FIRST, SECOND)))
    assert media_of(ChatRequest(messages)) == (SECOND, FIRST, SECOND)
    assert media_of(TokensRequest((1, 2), (SECOND, FIRST))) == (SECOND, FIRST)


def test_texts_and_processed_items_hold_no_images() -> None:
    processed = FeatureItem("hash", PlaceholderRange(0, 1), None)
    for request in ("text", CompletionRequest(("text",)), FeaturesRequest((7,), (processed,))):
        assert media_of(request) == ()

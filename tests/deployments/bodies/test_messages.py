import base64
from typing import Any

import pytest

from deployments.bodies.messages import MessageBody, conversation
from renderer.conversation import ImagePart, Message, TextPart
from renderer.errors import MediaError, RequestError, UnsupportedFieldError

URL = "data:image/png;base64," + base64.b64encode(b"picture").decode()


def converted(content: Any, **fields: Any) -> Message:
    (message,) = conversation([MessageBody(role="user", content=content, **fields)])
    return message


@pytest.mark.parametrize("content", ["", "text"])
def test_plain_content_stays_as_it_is(content: str | None) -> None:
    assert converted(content).content == content


def test_only_an_assistant_may_say_nothing() -> None:
    assert conversation([MessageBody(role="assistant", content=None)])[0].content is None
    assert conversation([MessageBody(role="user")])[0].content is None
    for role in ("user", "system", "tool"):
        with pytest.raises(ValueError, match="content must not be null"):
            MessageBody(role=role, content=None)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "text", "text": "a"}, TextPart("a")),
        ({"type": "input_text", "text": "a"}, TextPart("a")),
        ({"type": "refusal", "refusal": "a"}, TextPart("a")),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, ImagePart(b"picture")),
        ({"type": "image_url", "image_url": URL}, ImagePart(b"picture")),
        ({"image_url": URL}, ImagePart(b"picture")),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, ImagePart(b"picture")),
        ({"type": "image_url", "image_url": {"url": URL}, "uuid": 7}, ImagePart(b"picture", uuid="7")),
        ({"type": "image_url", "image_url": None, "uuid": "u"}, ImagePart(uuid="u")),
        ({"type": "image_url", "image_url": URL.replace("data", "DATA", 1)}, ImagePart(b"picture")),
        ({"type": "image_url", "image_url": {"url": ""}, "uuid": "u"}, ImagePart(uuid="u")),
        ({"type": "image_url", "image_url": "https://a.test/b"}, ImagePart(url="https://a.test/b")),
        (
            {"type": "image_url", "image_url": "HTTP://a.test/b", "uuid": "u"},
            ImagePart(url="HTTP://a.test/b", uuid="u"),
        ),
        ({"type": "image_url", "image_url": {"url": "file:///a/b"}}, ImagePart(url="file:///a/b")),
    ],
)
def test_every_form_of_a_part(part: dict[str, Any], expected: TextPart | ImagePart) -> None:
    assert converted([part]).content == (expected,)


@pytest.mark.parametrize(
    ("part", "error", "param"),
    [
        ({"type": "video_url", "video_url": "x"}, UnsupportedFieldError, "messages.0.content.0.type"),
        ({"type": "text", "text": "a", "bold": True}, UnsupportedFieldError, "messages.0.content.0.bold"),
        ({"type": "image_url", "image_url": {"url": URL, "crop": 1}}, UnsupportedFieldError, None),
        ({"text": "a"}, RequestError, "messages.0.content.0.type"),
        ({"type": "text"}, RequestError, "messages.0.content.0.text"),
        ({"type": "text", "text": 5}, RequestError, "messages.0.content.0.text"),
        ({"type": "image_url", "image_url": 5}, RequestError, "messages.0.content.0.image_url"),
        ("text", RequestError, "messages.0.content.0"),
        (5, RequestError, "messages.0.content.0"),
        ({"type": "input_image", "image_url": URL, "detail": "bogus"}, RequestError, "messages.0.content.0.detail"),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": 1}},
            RequestError,
            "messages.0.content.0.image_url.detail",
        ),
        ({"type": "image_url", "image_url": None}, MediaError, "image_url"),
        ({"type": "image_url", "image_url": "ftp://a/b.png"}, MediaError, "image_url"),
        ({"type": "image_url", "image_url": "/a/b.png"}, MediaError, "image_url"),
        ({"type": "image_url", "image_url": {"url": ""}}, MediaError, "image_url"),
    ],
)
def test_a_part_that_is_none_is_named(part: Any, error: type[Exception], param: str | None) -> None:
    with pytest.raises(error) as caught:
        converted([part])
    assert param is None or getattr(caught.value, "param", None) == param


def test_images_are_numbered_through_the_whole_conversation() -> None:
    good, bad = {"image_url": URL}, {"image_url": "data:;base64,@"}
    with pytest.raises(MediaError) as caught:
        conversation([MessageBody(role="user", content=[good, good]), MessageBody(role="user", content=[good, bad])])
    assert caught.value.index == 3


def test_what_only_templates_read_is_kept_and_nulls_of_an_echoed_answer_are_dropped() -> None:
    message = converted("a", name="me", tool_calls=None, annotations=[], audio=None, function_call=None)
    assert message.extra == {"name": "me"}


def test_an_unknown_field_of_a_message_is_named() -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        converted("a", mood="good")
    assert caught.value.param == "messages.0.mood"

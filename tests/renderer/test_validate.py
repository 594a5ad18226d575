"""What cannot be served is refused before any work, by the name of its field."""

from typing import Any

import pytest

from renderer import validate
from renderer.config import RendererConfig
from renderer.conversation import CompletionRequest, ImagePart, TokensRequest
from renderer.draft import Draft
from renderer.errors import ContextLengthError, RequestError
from renderer.family import TextOnly
from tests.renderer.builders import chat

CONFIG = RendererConfig(model="m", limit_mm_per_prompt={"image": 2})
LENGTH = 100


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"mm_processor_kwargs": {"max_pixels": 1}}, "mm_processor_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"tools": ()}, "tools"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        ({"cache_salt": "a\\b"}, "cache_salt"),
        ({"cache_salt": "a@b"}, "cache_salt"),
        ({"cache_salt": "a\0b"}, "cache_salt"),
        ({"cache_salt": "a" * 129}, "cache_salt"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 101}, "truncate_prompt_tokens"),
    ],
)
def test_a_chat_request_is_refused_by_the_field_at_fault(options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        validate.chat(chat("hi", **options), CONFIG, LENGTH)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_salt": "a" * 128},
        {"truncate_prompt_tokens": -1},
        {"truncate_prompt_tokens": 100},
        {"continue_final_message": True, "add_generation_prompt": False},
    ],
)
def test_a_sound_chat_request_passes(options: dict[str, Any]) -> None:
    validate.chat(chat("hi", **options), CONFIG, LENGTH)


def test_what_is_trusted_passes() -> None:
    config = RendererConfig(model="m", trust_request_chat_template=True, trust_request_mm_kwargs=True)
    validate.chat(chat("hi", chat_template="x", mm_processor_kwargs={"max_pixels": 1}), config, LENGTH)
    validate.tokens(TokensRequest((1,), mm_processor_kwargs={"max_pixels": 1}), config)


def test_requests_of_text_and_of_tokens_are_checked_alike() -> None:
    with pytest.raises(RequestError, match="no prompt"):
        validate.completion(CompletionRequest(()), LENGTH)
    for refused in (CompletionRequest(("a",), cache_salt="@"), CompletionRequest(("a",), truncate_prompt_tokens=0)):
        with pytest.raises(RequestError):
            validate.completion(refused, LENGTH)
    for broken in (TokensRequest((1,), cache_salt="@"), TokensRequest((1,), mm_processor_kwargs={"a": 1})):
        with pytest.raises(RequestError):
            validate.tokens(broken, CONFIG)


def test_a_chat_request_without_messages_is_refused() -> None:
    empty = chat("hi").__class__(())
    with pytest.raises(RequestError, match="no messages"):
        validate.chat(empty, CONFIG, LENGTH)


def test_more_images_than_allowed_are_refused() -> None:
    validate.media([ImagePart()] * 2, ["image"], CONFIG)
    with pytest.raises(RequestError, match=r"at most 2 image\(s\)") as caught:
        validate.media([ImagePart()] * 3, ["image"], CONFIG)
    assert caught.value.param == "image"
    with pytest.raises(RequestError, match=r"at most 0 image\(s\)"):
        validate.media([ImagePart()], [], CONFIG)


@pytest.mark.parametrize("ids", [[-1], [2**32]])
def test_what_are_no_tokens_is_refused(ids: list[int]) -> None:
    with pytest.raises(RequestError) as caught:
        validate.token_ids(ids, TextOnly(), "token_ids")
    assert caught.value.param == "token_ids"


def test_tokens_of_media_that_are_not_supported_are_refused() -> None:
    validate.token_ids([1, 2], TextOnly(reserved_ids=frozenset({7})), "prompt")
    with pytest.raises(RequestError, match="token 7"):
        validate.token_ids([1, 7], TextOnly(reserved_ids=frozenset({7})), "prompt")


def test_a_prompt_as_long_as_the_model_allows_passes() -> None:
    validate.length(LENGTH, LENGTH)
    with pytest.raises(ContextLengthError) as caught:
        validate.length(LENGTH + 1, LENGTH)
    assert caught.value.param == "input_tokens"


def test_a_text_too_long_for_any_tokens_is_refused_before_it_is_tokenized() -> None:
    validate.text_length("a" * 4000, 10, LENGTH)
    with pytest.raises(ContextLengthError) as caught:
        validate.text_length("a" * 4001, 10, LENGTH)
    assert caught.value.param == "input_text"


def test_a_prompt_without_tokens_is_refused_once_its_items_are_placed() -> None:
    with pytest.raises(RequestError, match="no tokens") as caught:
        Draft.of((), (), TextOnly(), None, "token_ids")
    assert caught.value.param == "token_ids"

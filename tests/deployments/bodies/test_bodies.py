import json
from typing import Any

import orjson
import pytest
from pydantic import BaseModel

from deployments.bodies.chat import ChatBody, RenderChatBody
from deployments.bodies.completion import CompletionBody
from deployments.bodies.strict import IGNORED, MAX_DEPTH, UNSUPPORTED, Body, parse
from deployments.bodies.tokenize import DetokenizeBody, TokenizeChatBody, parse_tokenize
from renderer.errors import RequestError, SchemaError, UnsupportedFieldError

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, {"messages": HELLO, **fields})


@pytest.mark.parametrize("field", sorted(IGNORED))
def test_a_field_that_cannot_change_the_answer_is_accepted(field: str) -> None:
    assert chat(**{field: "anything"}) == chat()


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_a_field_that_would_change_the_answer_is_refused_by_name(field: str) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        chat(**{field: "something else"})
    assert caught.value.param == field
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("field", "neutral"), [(name, value) for name, values in UNSUPPORTED.items() for value in values]
)
def test_a_value_that_changes_nothing_is_accepted(field: str, neutral: Any) -> None:
    assert chat(**{field: neutral}) == chat()


def test_null_is_the_same_as_leaving_a_field_out() -> None:
    every = {name: None for name in (*ChatBody.model_fields, *UNSUPPORTED, *IGNORED) if name != "messages"}
    assert chat(**every) == chat()


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFieldError, match="colour") as caught:
        chat(colour="red")
    assert caught.value.param == "colour"


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True, "a": 1}},
            {"reasoning_effort": "none", "enable_thinking": True, "a": 1},
        ),
    ],
)
def test_the_effort_of_reasoning_is_the_templates(fields: dict[str, Any], variables: dict[str, Any]) -> None:
    assert chat(**fields).request().chat_template_kwargs == variables


def test_no_field_is_both_known_and_unsupported() -> None:
    kinds: list[type[Body]] = [ChatBody, RenderChatBody, CompletionBody, TokenizeChatBody, DetokenizeBody]
    assert [kind.model_fields.keys() & (UNSUPPORTED.keys() | IGNORED) for kind in kinds] == [set()] * len(kinds)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b"{", "body.1"),
        (b"", "body.0"),
        (b"\xff", "body.0"),
        (b"null", "body"),
        (b"[]", "body"),
        (b'{"messages": "hi"}', "body.messages"),
        (b'{"messages": [{"content": "x"}]}', "body.messages.0.role"),
        (b'{"messages": [{"role": 1, "content": "x"}]}', "body.messages.0.role"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "body.messages.0.content"),
        (b'{"messages": [], "stop": ["a", "b", "c", "d", "e"]}', "body.stop"),
        (b'{"messages": [], "max_tokens": 1.5}', "body.max_tokens"),
        (b'{"messages": [], "stream_options": {"a": 1}, "stream": true}', "body.stream_options.a"),
    ],
)
def test_what_is_not_of_the_form_names_the_first_field_at_fault(data: bytes, param: str) -> None:
    with pytest.raises(SchemaError) as caught:
        parse(ChatBody, data)
    assert caught.value.param == param
    assert caught.value.type == "Bad Request"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


def test_a_dict_json_and_a_pydantic_object_are_the_same_body() -> None:
    class Theirs(BaseModel):
        messages: list[dict[str, str]]
        temperature: float | None = None

    body = {"messages": HELLO, "temperature": 0.5}
    expected = parse(ChatBody, body)
    assert parse(ChatBody, orjson.dumps(body)) == expected
    assert parse(ChatBody, Theirs(messages=HELLO, temperature=0.5)) == expected
    assert parse(ChatBody, expected) is expected


def test_the_newer_name_of_max_tokens_wins_and_is_the_one_that_is_named() -> None:
    assert chat(max_tokens=5, max_completion_tokens=6).sampling().max_tokens == 6
    with pytest.raises(RequestError) as caught:
        chat(max_completion_tokens=0).sampling()
    assert caught.value.param == "max_completion_tokens"


def test_completions_have_a_default_of_sixteen_tokens_and_chats_none() -> None:
    assert parse(CompletionBody, {"prompt": "a"}).sampling().max_tokens == 16
    assert chat().sampling().max_tokens is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert parse(CompletionBody, {"prompt": prompt}).request().prompts == prompts


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a"] * 1025])
def test_prompts_that_are_none_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse(CompletionBody, {"prompt": prompt}).request()
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("fields", [{"mm_payload": "none"}, {"return_mm_kwargs": False}])
def test_both_spellings_of_no_tensors(fields: dict[str, Any]) -> None:
    assert not parse(RenderChatBody, {"messages": HELLO, **fields}).tensors
    assert parse(RenderChatBody, {"messages": HELLO}).tensors


@pytest.mark.parametrize(
    ("form", "structured"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}, {"type": "array"}),
    ],
)
def test_response_formats(form: dict[str, Any], structured: dict[str, Any] | None) -> None:
    assert chat(response_format=form).sampling().structured == structured


def test_a_schema_that_is_asked_for_and_missing_is_named() -> None:
    with pytest.raises(SchemaError) as caught:
        chat(response_format={"type": "json_schema"}).sampling()
    assert caught.value.param == "body.response_format.json_schema"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [MAX_DEPTH, 500])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (lambda deep: {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": deep}}}}, "body"),
        (lambda deep: {"chat_template_kwargs": {"a": deep}}, "body"),
        (lambda deep: {"tools": [{"function": {"a": deep}}]}, "body"),
        (lambda deep: {"structured_outputs": {"json": json.dumps({"a": deep})}}, "structured_outputs"),
    ],
)
def test_what_is_nested_too_deep_to_be_passed_on_is_refused(fields: Any, param: str, depth: int) -> None:
    body = {"messages": HELLO, **fields(nested(depth))}
    with pytest.raises(SchemaError) as caught:
        parse(ChatBody, json.dumps(body).encode()).sampling()
    assert caught.value.param == param


def test_what_is_as_deep_as_may_be_is_taken() -> None:
    schema = {"a": nested(MAX_DEPTH - 4)}
    body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    assert parse(ChatBody, orjson.dumps(body)).sampling().structured == schema


def test_a_conversation_wins_over_a_text_in_tokenize() -> None:
    assert isinstance(parse_tokenize({"messages": HELLO, "prompt": "a"}), TokenizeChatBody)
    assert parse_tokenize({"prompt": "a"}).request() == "a"
    with pytest.raises(SchemaError) as caught:
        parse_tokenize({})
    assert caught.value.param == "body.prompt"


@pytest.mark.parametrize("tokens", [[-1], [2**63], ["a"], None])
def test_tokens_that_are_none_are_refused(tokens: Any) -> None:
    with pytest.raises(SchemaError):
        parse(DetokenizeBody, {"tokens": tokens})

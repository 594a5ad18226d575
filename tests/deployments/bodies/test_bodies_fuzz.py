"""Whatever JSON comes, a body is understood or refused by Greenroom's own 4xx; nothing else ever leaves a parser."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.answers.derender import parse_derender
from deployments.bodies.chat import RenderChatBody
from deployments.bodies.completion import CompletionBody
from deployments.bodies.strict import parse
from deployments.bodies.tokenize import DetokenizeBody, parse_tokenize
from renderer.errors import RequestError
from tests.stack.helpers import about, picture

OUTPUT = {
    "index": 0,
    "token_ids": [1, 2],
    "finish_reason": "stop",
    "logprobs": {"content": [{"token_id": 1, "logprob": -1.0, "top_logprobs": [{"token_id": 2, "logprob": -2.0}]}]},
}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    *about(picture(0)),
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.test/b"}, "uuid": "u"}]},
    {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
]


def chat(body: Any) -> None:
    parsed = parse(RenderChatBody, body)
    parsed.request()
    parsed.sampling()


def completion(body: Any) -> None:
    parsed = parse(CompletionBody, body)
    parsed.request()
    parsed.sampling()


def tokenize(body: Any) -> None:
    parse_tokenize(body).request()


def detokenize(body: Any) -> None:
    parse(DetokenizeBody, body)


def derender_chat(body: Any) -> None:
    parse_derender(body, chat=True).call()


def derender_text(body: Any) -> None:
    parse_derender(body, chat=False).call()


# Of each operation, bodies in which every field is sound.
BODIES: list[tuple[Callable[[Any], None], dict[str, Any]]] = [
    (
        chat,
        {
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "auto",
            "max_completion_tokens": 5,
            "temperature": 0.5,
            "seed": 1,
            "stop": ["a"],
            "stop_token_ids": [1],
            "logprobs": True,
            "top_logprobs": 2,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"a": 1},
            "truncate_prompt_tokens": 5,
            "cache_salt": "s",
            "priority": 1,
            "request_id": "r",
            "mm_payload": "none",
        },
    ),
    (completion, {"prompt": ["a", "b"], "max_tokens": 3, "logprobs": 1, "user": "u"}),
    (completion, {"prompt": [[1, 2], [3]], "n": 2}),
    (tokenize, {"messages": MESSAGES, "return_token_strs": True}),
    (tokenize, {"prompt": "a", "add_special_tokens": False}),
    (detokenize, {"tokens": [1, 2]}),
    (
        derender_chat,
        {
            "generate_response": {"request_id": "x", "choices": [OUTPUT], "usage": {"prompt_tokens": 1}},
            "prompt_token_ids": [1],
            "chat_request": {"skip_special_tokens": False},
        },
    ),
    (
        derender_chat,
        {
            "stream": True,
            "generate_chunk": {"request_id": "x", "choices": [OUTPUT]},
            "stream_state": {"context": [1], "pending": [2], "begun": True, "offset": 1},
        },
    ),
    (
        derender_text,
        {
            "generate_responses": [{"request_id": "x", "choices": [OUTPUT]}],
            "prompt_tokens": [1],
            "prompt_token_ids": [[1]],
        },
    ),
]

odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "data:,", "data:;base64,@", "file:", "http://[", "\ud800", -1, 2**63, 2**70, 1e400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a body, with each of its keys."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        yield from places(inner)


def damaged(number: int, changes: list[tuple[int, bool, str, Any]]) -> tuple[Callable[[Any], None], Any]:
    parser, sound = BODIES[number]
    body = copy.deepcopy(sound)
    for place, removes, name, value in changes:
        known = list(places(body))
        container, key = known[place % len(known)] if known else (body, name)
        if removes and isinstance(container, dict):
            del container[key]
            container[name] = value
        else:
            container[key] = value
    return parser, body


bodies = st.builds(
    damaged,
    st.integers(0, len(BODIES) - 1),
    st.lists(
        st.tuples(st.integers(0, 10**4), st.booleans(), st.text(max_size=8), odd),
        min_size=1,
        max_size=3,
    ),
)


def understood_or_refused(parser: Callable[[Any], None], body: Any) -> None:
    with contextlib.suppress(RequestError):
        parser(body)


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_the_bodies_to_be_damaged_are_sound(number: int) -> None:
    parser, sound = BODIES[number]
    parser(sound)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies)
def test_any_body_is_understood_or_refused(damage: tuple[Callable[[Any], None], Any]) -> None:
    understood_or_refused(*damage)


@pytest.mark.fuzz
@settings(max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies)
def test_twenty_thousand_bodies_are_understood_or_refused(damage: tuple[Callable[[Any], None], Any]) -> None:
    understood_or_refused(*damage)

"""Answers of token-in/token-out have the fields of vLLM's, whole and in chunks."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest

from deployments.answers.completions import Head, begun, whole
from deployments.answers.tokens import TokenForm, token_logprobs
from deployments.calls import Delta, Event, LogprobEntry, Served, Started
from renderer.prompt import PlaceholderRange

STARTED = Started(Served("engine", "r"), 4, 2, "step-3", (1, 2, 2, 3), (PlaceholderRange(1, 2),))
ENTRY = LogprobEntry("a", -1.5, (LogprobEntry("b", -0.5, (), 8, 1), LogprobEntry("a", -1.5, (), 7, 2)), 7, 2)
EVENTS: tuple[Event, ...] = (
    STARTED,
    Delta(0, "a", (7,), logprobs=(ENTRY,)),
    Delta(1, "", (9,)),
    Delta(0, "", (), None),
    Delta(0, "b", (8, 2), "stop", None),
    Delta(1, "c", (), "length", None),
)


def form(text: bool = False, prompt: bool = False) -> TokenForm:
    return TokenForm(Head("generate-tokens-x", "m", 5), text, prompt)


async def events() -> AsyncGenerator[Event]:
    for event in EVENTS:
        yield event


def as_json(answer: object) -> Any:
    return orjson.loads(orjson.dumps(answer))


async def test_a_whole_answer() -> None:
    answer = as_json((await whole(events(), form(prompt=True))).value)
    assert (answer["request_id"], answer["model"], answer["created"]) == ("generate-tokens-x", "m", 5)
    assert answer["output_mode"] == "tokens"
    assert answer["prompt_token_ids"] == [1, 2, 2, 3]
    assert answer["mm_placeholders"] == {"image": [{"offset": 1, "length": 2}]}
    nulls = {"prompt_logprobs", "prompt_token_id_logprobs", "metrics", "kv_transfer_params", "ec_transfer_params"}
    assert all(answer[name] is None for name in nulls)
    first, second = answer["choices"]
    assert first["token_ids"] == [7, 8, 2]
    assert first["finish_reason"] == "stop"
    assert first["weight_versions"] == [{"version": "step-3", "start": 0, "end": 3}]
    assert (first["routed_experts"], first["sampling_mask"]) == (None, None)
    assert second["token_ids"] == [9]
    assert "text" not in first
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_chunks() -> None:
    reply = await begun(events(), form(prompt=True), include_usage=True)
    chunks = [as_json(chunk) async for chunk in reply.value]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks[:-1]] == [[7], [9], [8, 2], []]
    assert chunks[0]["prompt_token_ids"] == [1, 2, 2, 3]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    ends = [chunk["choices"][0]["weight_versions"] for chunk in chunks[:-1]]
    assert ends == [
        None,
        None,
        [{"version": "step-3", "start": 0, "end": 3}],
        [{"version": "step-3", "start": 0, "end": 1}],
    ]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["total_tokens"]) == ([], 8)


async def test_text_mode() -> None:
    answer = as_json((await whole(events(), form(text=True))).value)
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "c"]
    assert answer["output_mode"] == "text"
    assert answer["choices"][0]["logprobs"]["content"][0]["token"] == "a"
    assert answer["prompt_token_ids"] is None


def test_the_sampled_token_comes_first_and_once() -> None:
    logprobs = token_logprobs((ENTRY,))
    assert logprobs == {
        "content": [
            {
                "token_id": 7,
                "logprob": -1.5,
                "rank": 2,
                "top_logprobs": [
                    {"token_id": 7, "logprob": -1.5, "rank": 2},
                    {"token_id": 8, "logprob": -0.5, "rank": 1},
                ],
            }
        ]
    }
    assert token_logprobs(()) is None


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_what_json_lacks_is_the_lowest(value: float) -> None:
    logprobs = token_logprobs((LogprobEntry("a", value, (), 7, 1),))
    assert logprobs is not None
    assert logprobs["content"][0]["logprob"] == -9999.0

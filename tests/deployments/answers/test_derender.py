"""What an engine generated becomes the answer that its own server would have given, whole or chunk by chunk."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from deployments.answers.texts import derendered
from deployments.calls import DerenderCall, OutputTokens
from deployments.config import GreenroomConfig
from renderer.renderer import Renderer

CONFIG = GreenroomConfig.model_validate(
    {"model": "demo/model", "renderer": {"media_threads": 1, "render_threads": 1}, "engine": None}
)
CHAT, TEXT = "/v1/chat/completions/derender", "/v1/completions/derender"
SENTENCE = "A café, 日本, and 🎭 words."


@pytest.fixture
def ids(renderer: Renderer) -> list[int]:
    """A sentence and the end that its model puts after it."""
    return [*renderer.tokenize(SENTENCE, add_special_tokens=False), renderer.tokenizer.id_of("<|im_end|>")]


def response(*choices: list[int], **fields: Any) -> dict[str, Any]:
    told = [{"index": place, "token_ids": ids, "finish_reason": "stop"} for place, ids in enumerate(choices)]
    return {"request_id": "generate-tokens-x", "choices": told, **fields}


async def test_a_whole_chat_answer(http: httpx.AsyncClient, ids: list[int]) -> None:
    body = {"generate_response": response(ids, ids[:2]), "prompt_tokens": 12, "prompt_token_ids": [1, 2, 3]}
    got = await http.post(CHAT, json=body)
    assert got.status_code == 200, got.text
    answer = ChatCompletion.model_validate_json(got.text)
    assert answer.choices[0].message.content == SENTENCE
    assert (answer.id, answer.object, answer.model) == (
        "generate-tokens-x",
        "chat.completion",
        CONFIG.served_model_names[0],
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (12, len(ids) + 2)
    choice = got.json()["choices"][0]
    assert choice["token_ids"] is None
    assert got.json().keys() == {
        *("id", "object", "created", "model", "choices", "usage", "service_tier", "system_fingerprint", "metrics"),
        *("prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params"),
    }
    assert choice["message"].keys() == {
        *("role", "content", "refusal", "annotations", "audio", "function_call", "reasoning"),
    }
    assert answer.usage.prompt_tokens_details is None


async def test_what_the_original_request_says_of_the_text_is_followed(http: httpx.AsyncClient, ids: list[int]) -> None:
    original = {"messages": [], "skip_special_tokens": False, "return_token_ids": True, "temperature": 0, "any": 1}
    got = (await http.post(CHAT, json={"generate_response": response(ids), "chat_request": original})).json()
    assert got["choices"][0]["message"]["content"] == SENTENCE + "<|im_end|>"
    assert got["choices"][0]["token_ids"] == ids


async def test_what_an_engine_says_beside_the_tokens_is_kept_or_passed_over(
    http: httpx.AsyncClient, ids: list[int]
) -> None:
    given = response(
        ids,
        model="other",
        usage={"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8, "prompt_tokens_details": None},
        prompt_logprobs=[None],
        kv_transfer_params={"a": 1},
        metrics={"anything": 1},
        output_mode="tokens",
    )
    given["choices"][0] |= {"stop_reason": 3, "routed_experts": None, "weight_versions": [{"version": "default"}]}
    got = (await http.post(CHAT, json={"generate_response": given})).json()
    assert (got["prompt_logprobs"], got["kv_transfer_params"]) == ([None], {"a": 1})
    assert got["usage"]["prompt_tokens"] == 7
    assert got["choices"][0]["stop_reason"] == 3


async def test_logprobs_are_spelled(http: httpx.AsyncClient, renderer: Renderer) -> None:
    first, second = renderer.tokenize("hello", add_special_tokens=False)[:2]
    entry = {
        "token_id": first,
        "logprob": -0.5,
        "rank": 1,
        "top_logprobs": [{"token_id": second, "logprob": -1, "rank": 2}],
    }
    given = response([first])
    given["choices"][0]["logprobs"] = {"content": [entry]}
    chat = (await http.post(CHAT, json={"generate_response": given})).json()["choices"][0]["logprobs"]
    spelled, other = renderer.detokenize([first]), renderer.detokenize([second])
    assert chat["content"][0]["token"] == spelled
    assert chat["content"][0]["top_logprobs"][0] == {"token": other, "logprob": -1.0, "bytes": list(other.encode())}
    text = (await http.post(TEXT, json={"generate_responses": [given]})).json()["choices"][0]["logprobs"]
    assert text == {
        "tokens": [spelled],
        "token_logprobs": [-0.5],
        "top_logprobs": [{other: -1.0}],
        "text_offset": [0],
    }


async def test_completions_number_the_choices_of_all_prompts(http: httpx.AsyncClient, ids: list[int]) -> None:
    body = {
        "generate_responses": [response(ids, ids), response(ids, request_id="second")],
        "prompt_tokens": [3, 4],
        "prompt_token_ids": [None, [1]],
    }
    got = await http.post(TEXT, json=body)
    answer = Completion.model_validate_json(got.text)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.text for choice in answer.choices} == {SENTENCE}
    assert answer.usage is not None
    assert (answer.id, answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        "generate-tokens-x",
        7,
        3 * len(ids),
    )


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stream_gives_the_text_of_the_whole_answer_with_nothing_kept_here(
    http: httpx.AsyncClient, ids: list[int], path: str
) -> None:
    state: Any = None
    chunks = []
    for place, token_id in enumerate(ids):
        finish = "stop" if place == len(ids) - 1 else None
        choice = {"index": 0, "token_ids": [token_id], "finish_reason": finish}
        chunk = {"request_id": "x", "choices": [choice], "usage": None}
        got = (await http.post(path, json={"stream": True, "generate_chunk": chunk, "stream_state": state})).json()
        state = json.loads(json.dumps(got["stream_state"]))
        assert len(state["context"]) + len(state["pending"]) <= 32
        chunks.append(got["chunk"])
    if path == CHAT:
        parsed = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
        texts = [chunk.choices[0].delta.content or "" for chunk in parsed]
        assert [chunk.choices[0].delta.role for chunk in parsed] == ["assistant"] + [None] * (len(ids) - 1)
        assert parsed[-1].choices[0].finish_reason == "stop"
    else:
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == SENTENCE
    assert state["offset"] == len(SENTENCE)
    assert "\ufffd" not in "".join(texts)


async def test_a_chunk_without_choices_carries_the_usage_and_changes_no_state(http: httpx.AsyncClient) -> None:
    chunk = {"request_id": "x", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}}
    state = {"context": [1, 2], "pending": [3], "begun": True, "offset": 4}
    for path in (CHAT, TEXT):
        body = {"stream": True, "generate_chunk": chunk, "stream_state": state, "prompt_tokens": 9}
        got = (await http.post(path, json=body)).json()
        assert got["stream_state"] == state
        assert got["chunk"]["choices"] == []
        assert (got["chunk"]["usage"]["prompt_tokens"], got["chunk"]["usage"]["completion_tokens"]) == (9, 5)


ONE = response([1])


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {}, 400, "body.generate_response"),
        (CHAT, {"generate_response": response([])}, 400, "generate_response"),
        (CHAT, {"generate_response": response()}, 400, "body.generate_response.choices"),
        (CHAT, {"generate_response": response([1], output_mode="text")}, 400, "body.generate_response.output_mode"),
        (CHAT, {"generate_response": response([-1])}, 400, "body.generate_response.choices.0.token_ids.0"),
        (CHAT, {"generate_response": response([2**40])}, 400, "tokens"),
        (CHAT, {"generate_response": response([1] * 5000)}, 400, "token_ids"),
        (CHAT, {"generate_response": ONE, "model": "other"}, 404, "model"),
        (CHAT, {"generate_response": ONE, "colour": 1}, 400, "colour"),
        (TEXT, {"generate_responses": []}, 400, "body.generate_responses"),
        (TEXT, {"generate_responses": [ONE], "prompt_tokens": [1, 2]}, 400, "prompt_tokens"),
        (TEXT, {"generate_responses": [ONE], "prompt_token_ids": []}, 400, "prompt_token_ids"),
        (CHAT, {"stream": True}, 400, "body.generate_chunk"),
        (CHAT, {"stream": True, "generate_chunk": response([1], [2])}, 400, "body.generate_chunk.choices"),
        (
            CHAT,
            {"stream": True, "generate_chunk": ONE, "stream_state": {"context": [1] * 99}},
            400,
            "body.stream_state.context",
        ),
        (CHAT, {"stream": True, "generate_chunk": ONE, "stream_state": {}}, 400, "body.stream_state.context"),
        (
            CHAT,
            {"stream": True, "generate_chunk": ONE, "stream_state": {"context": [], "more": 1}},
            400,
            "body.stream_state.more",
        ),
    ],
)
async def test_what_cannot_be_derendered_names_its_field(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    got = await http.post(path, json=body)
    assert (got.status_code, got.json()["error"]["param"]) == (status, param), got.text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 800), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=6),
    st.lists(st.integers(0, 800), max_size=9),
    st.booleans(),
)
def test_however_a_stream_is_cut_its_text_is_that_of_the_whole(
    renderer: Renderer, ids: list[int], cuts: list[int], prompt: list[int], skip: bool
) -> None:
    tail = tuple(prompt[-6:])
    (whole,) = derendered(renderer, DerenderCall((OutputTokens(tuple(ids), tail),), skip))
    edges = sorted({0, len(ids), *(cut % len(ids) for cut in cuts)})
    text, state = "", None
    for start, end in itertools.pairwise(edges):
        output = OutputTokens(tuple(ids[start:end]), tail, finished=end == len(ids), state=state)
        (piece,) = derendered(renderer, DerenderCall((output,), skip, stream=True))
        text, state = text + piece.text, piece.state
    assert text == whole.text

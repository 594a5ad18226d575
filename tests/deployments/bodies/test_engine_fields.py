"""Fields that no engine here follows: render answers pass them on as the protocol has them, generations refuse them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from deployments.bodies.chat import ChatBody
from deployments.bodies.completion import CompletionBody
from deployments.bodies.engine_fields import EngineFields
from deployments.bodies.generate import GenerateBody
from deployments.bodies.strict import parse
from deployments.calls import SamplingRequest
from deployments.config import GreenroomConfig
from renderer.errors import RequestError

CONFIG = GreenroomConfig.model_validate(
    {"model": "demo/model", "renderer": {"media_threads": 1, "render_threads": 1}, "engine": None}
)
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
PASSED_ON: Mapping[str, tuple[Any, Any]] = {
    "logit_bias": ({"5": 1, "7": -200}, {"5": 1.0, "7": -100.0}),
    "allowed_token_ids": ([5, 6], [5, 6]),
    "bad_words": (["ugly", "bad", "ugly"], ["ugly", "bad"]),
    "prompt_logprobs": (0, 0),
    "logprob_token_ids": ([5], [5]),
    "spaces_between_special_tokens": (False, False),
    "thinking_token_budget": (9, 9),
    "stream_interval": (4, 4),
    "repetition_detection": (
        {"max_pattern_size": 8, "min_count": 3},
        {"max_pattern_size": 8, "min_pattern_size": 0, "min_count": 3},
    ),
    "structured_outputs": ({"choice": ["yes", "no"], "regex": None, "_backend": None}, {"choice": ["yes", "no"]}),
    "routed_experts_prompt_start": (2, 2),
    "watermarking": (False, False),
}
NOTHING: Mapping[str, Any] = {
    "logit_bias": {},
    "allowed_token_ids": [],
    "bad_words": [],
    "logprob_token_ids": [],
    "spaces_between_special_tokens": True,
    "thinking_token_budget": -1,
    "routed_experts_prompt_start": 0,
    "vllm_xargs": {},
    "kv_transfer_params": {},
    "include_reasoning": True,
    "return_token_ids": False,
}
REFUSED: Mapping[str, Any] = {
    "logit_bias": {"abc": 1},
    "bad_words": [""],
    "prompt_logprobs": -2,
    "thinking_token_budget": -3,
    "repetition_detection": {"max_pattern_size": 8, "min_count": 1},
    "structured_outputs": {"regex": "a", "choice": ["a"]},
}
ONLY_GENERATED: Mapping[str, Any] = {
    "vllm_xargs": {"a": 1},
    "kv_transfer_params": {"a": 1},
    "ec_transfer_params": {"a": 1},
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "return_prompt_text": True,
    "return_token_offsets": True,
    "include_reasoning": False,
}


def chat(**fields: Any) -> SamplingRequest:
    return parse(ChatBody, {**HELLO, "logprobs": True, **fields}).sampling()


def completion(**fields: Any) -> SamplingRequest:
    return parse(CompletionBody, {"prompt": "a", "logprobs": 1, **fields}).sampling()


def generate(**fields: Any) -> SamplingRequest:
    return parse(GenerateBody, {"token_ids": [1], "sampling_params": fields}).sampling()


def test_every_field_is_tried() -> None:
    assert PASSED_ON.keys() == EngineFields.model_fields.keys()


@pytest.mark.parametrize("sampling", [chat, completion, generate])
@pytest.mark.parametrize("name", PASSED_ON)
def test_a_field_is_passed_on_and_not_followed(name: str, sampling: Any) -> None:
    given, written = PASSED_ON[name]
    asked = sampling(**{name: given})
    assert (asked.passed_on, asked.unfollowed) == ({name: written}, (name,))


@pytest.mark.parametrize("name", NOTHING)
def test_a_value_that_asks_for_nothing_is_neither_passed_on_nor_refused(name: str) -> None:
    asked = chat(**{name: NOTHING[name]})
    assert (asked.passed_on, asked.unfollowed) == ({}, ())


@pytest.mark.parametrize("sampling", [chat, completion, generate])
@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_no_engine_takes_is_refused_by_name(name: str, sampling: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        sampling(**{name: REFUSED[name]})
    assert refusal.value.param == name


def test_what_belongs_to_connectors_travels_in_extra_args() -> None:
    asked = chat(vllm_xargs={"a": 1}, kv_transfer_params={"b": 2}, ec_transfer_params={"c": 3})
    extra = {"a": 1, "kv_transfer_params": {"b": 2}, "ec_transfer_params": {"c": 3}}
    assert asked.passed_on == {"extra_args": extra}
    assert generate(extra_args=extra).passed_on == {"extra_args": extra}
    assert generate(extra_args=extra).unfollowed == ("extra_args",)


def test_logprobs_of_chosen_tokens_take_the_place_of_the_likeliest() -> None:
    assert chat(top_logprobs=2, logprob_token_ids=[5]).logprobs is None
    assert completion(logprobs=2, logprob_token_ids=[5]).logprobs is None
    for sampling, none in ((chat, False), (completion, None)):
        with pytest.raises(RequestError, match="needs logprobs"):
            sampling(logprobs=none, logprob_token_ids=[5])


def test_a_schema_is_followed_however_it_is_asked_for_but_not_twice() -> None:
    schema = {"type": "object"}
    assert chat(structured_outputs={"json": schema}).structured == schema
    assert chat(structured_outputs={"json": schema}).unfollowed == ()
    assert completion(structured_outputs={"json_object": True}).structured == {}
    with pytest.raises(RequestError, match="exclude"):
        chat(structured_outputs={"json": schema}, response_format={"type": "json_object"})


def test_a_schema_whose_whitespace_is_prescribed_is_passed_on() -> None:
    asked = chat(structured_outputs={"json": {}, "whitespace_pattern": "a"})
    assert asked.structured is None
    assert asked.passed_on == {"structured_outputs": {"json": {}, "whitespace_pattern": "a"}}


def test_tokens_of_a_connector_never_take_the_place_of_what_is_rendered() -> None:
    with pytest.raises(RequestError) as refusal:
        chat(kv_transfer_params={"prompt_token_ids": [1]})
    assert refusal.value.param == "kv_transfer_params.prompt_token_ids"


def test_logprobs_of_prompts_are_not_streamed() -> None:
    with pytest.raises(RequestError, match="streamed"):
        chat(prompt_logprobs=2, stream=True)


@pytest.mark.parametrize("name", [*PASSED_ON, *ONLY_GENERATED])
async def test_a_generation_refuses_by_name_what_a_render_answer_takes(http: httpx.AsyncClient, name: str) -> None:
    value = PASSED_ON[name][0] if name in PASSED_ON else ONLY_GENERATED[name]
    body = {**HELLO, "logprobs": True, name: value}
    refused = await http.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name), refused.text
    rendered = await http.post("/v1/chat/completions/render", json=body)
    assert rendered.status_code == 200, rendered.text
    answer = rendered.json()
    if name in PASSED_ON:
        assert answer["sampling_params"][name] == PASSED_ON[name][1]
    assert answer["reasoning_ended"] == (True if name == "include_reasoning" else None)


@pytest.mark.parametrize("name", PASSED_ON)
async def test_a_generate_request_refuses_by_name_what_its_rendering_takes(http: httpx.AsyncClient, name: str) -> None:
    given, written = PASSED_ON[name]
    body = {"token_ids": [1, 2], "sampling_params": {name: given}}
    refused = await http.post("/inference/v1/generate", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name), refused.text
    rendered = await http.post("/inference/v1/generate/render", json=body)
    assert rendered.json()["sampling_params"][name] == written

from typing import Any

import pytest

from deployments.calls import SamplingRequest
from deployments.sampling import check, resolve
from engine.protocol import SamplingParams
from renderer.errors import ContextLengthError, RequestError


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.1]),
        ("top_p", [0, 1.1]),
        ("top_k", [-2]),
        ("min_p", [-0.1, 1.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0, -1]),
        ("seed", [2**63]),
        ("n", [0, 16385]),
        ("max_tokens", [0, -1]),
        ("min_tokens", [-1]),
        ("stop", [("",)]),
    ],
)
def test_a_value_out_of_range_is_named(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError) as caught:
            check(SamplingRequest(**{field: value}))
        assert caught.value.param == field


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2.0},
        {"top_p": 1},
        {"top_k": -1},
        {"top_k": 0},
        {"min_p": 1},
        {"repetition_penalty": 0.01},
        {"seed": -1},
        {"n": 16384},
        {"max_tokens": 1, "min_tokens": 1},
    ],
)
def test_the_ends_of_the_ranges_are_taken(fields: dict[str, Any]) -> None:
    check(SamplingRequest(**fields))


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens"):
        check(SamplingRequest(max_tokens=2, min_tokens=3))


def test_without_any_wish_everything_is_plain_and_the_context_is_the_limit() -> None:
    assert resolve(SamplingRequest(), {}, 10, 100) == SamplingParams(max_tokens=90)


def test_the_checkpoints_defaults_hold_where_the_body_is_silent() -> None:
    defaults = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "max_new_tokens": 30}
    params = resolve(SamplingRequest(top_p=0.5), defaults, 10, 100)
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.5, 20)
    assert (params.repetition_penalty, params.max_tokens) == (1.05, 30)


def test_greedy_makes_the_filters_void() -> None:
    params = resolve(SamplingRequest(temperature=0, top_p=0.5, top_k=3, min_p=0.1), {}, 10, 100)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 1, 0, 0)


def test_a_temperature_next_to_nothing_is_raised() -> None:
    assert resolve(SamplingRequest(temperature=0.001), {}, 10, 100).temperature == 0.01


def test_several_choices_of_a_greedy_request_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        resolve(SamplingRequest(temperature=0, n=2), {}, 10, 100)
    assert caught.value.param == "n"


def test_more_than_is_left_is_lowered_and_more_than_the_model_takes_is_refused() -> None:
    assert resolve(SamplingRequest(max_tokens=95), {}, 10, 100).max_tokens == 90
    with pytest.raises(ContextLengthError) as caught:
        resolve(SamplingRequest(max_tokens=101), {}, 10, 100)
    assert caught.value.param == "max_tokens"


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="100 tokens"):
        resolve(SamplingRequest(), {}, 100, 100)


def test_minus_one_is_no_seed_and_no_top_k() -> None:
    params = resolve(SamplingRequest(seed=-1, top_k=-1, stop_token_ids=(3, 3, 1)), {}, 10, 100)
    assert (params.seed, params.top_k, params.stop_token_ids) == (None, 0, (3, 1))

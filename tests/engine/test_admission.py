"""What could fail a step, and others with it, is refused before it runs, and the field is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.worker import Worker
from renderer.errors import ConfigError, ContextLengthError, RequestError
from renderer.prompt import RenderedPrompt
from tests.checkpoints import checkpoint
from tests.engine.builders import GREEDY, Picture, Rig, Text, engine_config, lab

FAMILY = "qwen2_5_vl"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(Worker(engine_config(checkpoint(FAMILY))))


def refusal(rig: Rig, prompt: RenderedPrompt, **params: Any) -> RequestError:
    error = rig.failures[rig.submit(prompt, dataclasses.replace(GREEDY, **params))]
    assert isinstance(error, RequestError)
    assert not rig.worker.scheduler.has_work
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", NAN),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("presence_penalty", INF),
        ("frequency_penalty", NAN),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("logprobs", -1),
        ("logprobs", 10**6),
        ("stop_token_ids", (10**6,)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_a_parameter_out_of_bounds_is_refused_by_name(rig: Rig, field: str, value: object) -> None:
    assert refusal(rig, lab(FAMILY).prompt(Text(4)), **{field: value}).param == field


def test_extreme_parameters_within_bounds_run(rig: Rig) -> None:
    extremes: list[dict[str, Any]] = [
        {"temperature": 1e-9, "seed": 1},
        {"temperature": 1e9, "seed": -(10**30)},
        {"temperature": 1.0, "top_p": 1e-9, "top_k": 10**9, "min_p": 1.0},
        {"presence_penalty": -1e9, "frequency_penalty": 1e9, "repetition_penalty": 1e-9},
        {"logprobs": rig.worker.model.vocab_size},
        {"min_tokens": 10**9, "ignore_eos": False},
    ]
    keys = [rig.submit(lab(FAMILY).prompt(Text(4)), dataclasses.replace(GREEDY, **extreme)) for extreme in extremes]
    rig.run()
    assert [len(rig.tokens[key]) for key in keys] == [GREEDY.max_tokens] * len(keys)


def test_a_request_that_is_too_long_says_by_what(rig: Rig) -> None:
    by_output = refusal(rig, lab(FAMILY).prompt(Text(1000)), max_tokens=25)
    assert type(by_output) is ContextLengthError
    assert by_output.param == "max_tokens"
    by_prompt = refusal(rig, lab(FAMILY).prompt(Text(1024)))
    assert by_prompt.param == "prompt"
    assert rig.answers(lab(FAMILY).prompt(Text(1014)))


def test_an_item_whose_range_it_does_not_fill_is_named(rig: Rig) -> None:
    prompt = lab(FAMILY).prompt(Picture(1), Picture(2), Text(4))
    first, second = prompt.items
    short = dataclasses.replace(second, range=dataclasses.replace(second.range, length=second.range.length - 1))
    error = refusal(rig, dataclasses.replace(prompt, items=(first, short)))
    assert "item 1" in str(error)


def test_a_text_model_refuses_items() -> None:
    rig = Rig(Worker(engine_config(checkpoint("qwen2"))))
    prompt = dataclasses.replace(lab(FAMILY).prompt(Picture(1)), token_ids=(1,) * 50)
    assert "no images" in str(refusal(rig, prompt))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"max_model_len": 10**9}, "positions"), ({"max_model_len": 1024, "kv_cache_bytes": 1 << 16}, "kv_cache_bytes")],
)
def test_a_length_that_cannot_be_held_is_a_config_error(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Worker(engine_config(checkpoint(FAMILY), **changes))


def test_without_a_configured_length_the_pool_bounds_it() -> None:
    worker = Worker(engine_config(checkpoint(FAMILY), max_model_len=None))
    assert worker.admission.max_model_len == worker.pool.num_blocks * worker.config.block_size

"""Structured output follows its schema whatever the model would rather say, and goes on where another replica left."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine.grammar import Grammar
from engine.protocol import SamplingParams
from engine.worker import Worker
from renderer.errors import EngineError, NotSupportedError, RequestError
from tests.checkpoints import checkpoint
from tests.engine.builders import GREEDY, Rig, Text, engine_config, lab

FAMILY = "qwen2_5_vl"
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
    },
    "required": ["shape", "count", "sure"],
    "additionalProperties": False,
}
STRUCTURED = SamplingParams(max_tokens=120, temperature=1.0, structured=SCHEMA)


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(Worker(engine_config(checkpoint(FAMILY))))


def text_of(tokens: list[int]) -> str:
    text = AutoTokenizer.from_pretrained(checkpoint(FAMILY)).decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def follows_schema(text: str) -> bool:
    answer = json.loads(text)
    return (
        set(answer) == {"shape", "count", "sure"}
        and answer["shape"] in ("circle", "square")
        and type(answer["count"]) is int
        and 0 <= answer["count"] <= 99
        and type(answer["sure"]) is bool
    )


def test_random_output_follows_the_schema(rig: Rig) -> None:
    keys = [
        rig.submit(lab(FAMILY).prompt(Text(5, seed)), dataclasses.replace(STRUCTURED, seed=seed)) for seed in range(8)
    ]
    rig.run()
    answers = [text_of(rig.tokens[key]) for key in keys]
    assert all(follows_schema(answer) for answer in answers)
    assert len(set(answers)) > 2
    assert {rig.ends[key].finish_reason for key in keys} == {"stop"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_counts_for_more_than_a_least_number_of_tokens(rig: Rig, temperature: float) -> None:
    """Whatever would end the output is held back, and the schema leaves nothing else."""
    every = tuple(range(rig.worker.model.vocab_size))
    asked = dataclasses.replace(
        STRUCTURED, temperature=temperature, seed=2, stop_token_ids=every, min_tokens=120, ignore_eos=False
    )
    key = rig.submit(lab(FAMILY).prompt(Text(5)), asked)
    rig.run()
    assert follows_schema(text_of(rig.tokens[key]))


def test_output_that_leaves_its_schema_ends_with_an_error_and_costs_its_neighbour_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the library gives a grammar up that has become too large."""
    prompt = lab(FAMILY).prompt(Text(5, 60))
    with monkeypatch.context() as broken:
        broken.setattr(Grammar, "allowed", lambda self: np.zeros(self._vocab_size, dtype=bool))
        structured = rig.submit(lab(FAMILY).prompt(Text(5, 61)), dataclasses.replace(STRUCTURED, seed=1))
        free = rig.submit(prompt)
        rig.run()
    assert type(rig.failures[structured]) is EngineError
    assert not rig.tokens[structured]
    assert tuple(rig.tokens[free]) == lab(FAMILY).alone(prompt, GREEDY.max_tokens)
    assert rig.worker.stats.blocks_used == 0


def test_a_neighbour_without_a_grammar_is_free(rig: Rig) -> None:
    prompt = lab(FAMILY).prompt(Text(5, 50))
    structured = rig.submit(lab(FAMILY).prompt(Text(5)), dataclasses.replace(STRUCTURED, seed=1))
    free = rig.submit(prompt)
    rig.run()
    assert tuple(rig.tokens[free]) == lab(FAMILY).alone(prompt, GREEDY.max_tokens)
    assert follows_schema(text_of(rig.tokens[structured]))


def test_another_replica_continues_at_any_token(rig: Rig) -> None:
    prompt, params = lab(FAMILY).prompt(Text(5)), dataclasses.replace(STRUCTURED, seed=3)
    whole = rig.submit(prompt, params)
    rig.run()
    tokens = rig.tokens[whole]
    rests = [rig.submit(prompt, params, prior=tokens[:cut]) for cut in range(len(tokens) + 1)]
    rig.run()
    assert [tokens[:cut] + rig.tokens[key] for cut, key in enumerate(rests)] == [tokens] * len(rests)


def test_an_empty_schema_means_any_object(rig: Rig) -> None:
    key = rig.submit(lab(FAMILY).prompt(Text(5, 2)), dataclasses.replace(STRUCTURED, structured={}, max_tokens=4))
    rig.run()
    assert text_of(rig.tokens[key]).startswith("{")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, nested(400), nested(3000)], ids=["nonsense", "deep", "deeper than can be written"]
)
def test_a_schema_that_cannot_be_followed_is_refused(rig: Rig, schema: dict[str, Any]) -> None:
    key = rig.submit(lab(FAMILY).prompt(Text(5)), dataclasses.replace(STRUCTURED, structured=schema))
    assert type(rig.failures[key]) is RequestError
    assert rig.failures[key].param == "response_format"


def test_output_that_breaks_the_schema_cannot_be_continued(rig: Rig) -> None:
    key = rig.submit(lab(FAMILY).prompt(Text(5)), STRUCTURED, prior=(30, 31))
    assert type(rig.failures[key]) is RequestError


def test_without_a_tokenizer_structured_output_is_refused_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(Worker(engine_config(checkpoint(FAMILY))))
    monkeypatch.setattr(rig.worker, "_grammars", None)
    key = rig.submit(lab(FAMILY).prompt(Text(5)), STRUCTURED)
    assert type(rig.failures[key]) is NotSupportedError
    assert rig.answers(lab(FAMILY).prompt(Text(5)))

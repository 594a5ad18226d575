"""Every row is treated by its own parameters, and a token depends on seed and place alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from engine.protocol import SamplingParams, TokenLogprobs
from engine.request import Request
from engine.sampling import sample, uniform

VOCABULARY = 50
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * 1.5
PROBS = LOGITS.double().softmax(-1)
ORDER = PROBS.argsort(descending=True).tolist()
PLAIN = SamplingParams(max_tokens=4000)


def request_of(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Request:
    prompt, output = prompt or [1], output or []
    return Request(
        key=0,
        tokens=np.array([*prompt, *output], dtype=np.int32),
        num_prompt=len(prompt),
        num_tokens=len(prompt) + len(output),
        params=dataclasses.replace(PLAIN, **params),
        items=(),
        positions=np.zeros((1, len(prompt)), dtype=np.int64),
        delta=0,
        cache_salt=None,
        seed=params.get("seed") or 0,
        grammar=None,
        block_table=np.zeros(1, dtype=np.int32),
    )


def choose(*requests: Request, eos: frozenset[int] = frozenset()) -> list[int]:
    return sample(LOGITS.repeat(len(requests), 1), requests, eos)[0]


def draws(count: int, **params: Any) -> Counter[int]:
    """Tokens of many seeds."""
    return Counter(choose(*(request_of(seed=seed, **params) for seed in range(1, count + 1))))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert choose(request_of(temperature=0.0, top_p=0.1, seed=1)) == [ORDER[0]]


def test_tokens_come_as_often_as_they_are_likely() -> None:
    counts = draws(20_000)
    expected = PROBS.numpy() * 20_000
    seen = np.array([counts[token] for token in range(VOCABULARY)])
    likely = expected > 20
    assert (np.abs(seen - expected)[likely] < 5 * np.sqrt(expected[likely])).all()
    assert len([token for token in counts if expected[token] < 1e-3]) == 0


def test_a_cut_that_cuts_nothing_changes_no_frequency() -> None:
    counts = draws(20_000, top_k=VOCABULARY)
    expected = PROBS.numpy() * 20_000
    seen = np.array([counts[token] for token in range(VOCABULARY)])
    likely = expected > 20
    assert (np.abs(seen - expected)[likely] < 5 * np.sqrt(expected[likely])).all()


def test_temperature_sharpens_and_flattens() -> None:
    cold, warm = draws(2000, temperature=0.3), draws(2000, temperature=3.0)
    assert cold[ORDER[0]] > draws(2000)[ORDER[0]] > warm[ORDER[0]]


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(draws(3000, top_k=3)) == set(ORDER[:3])
    assert set(draws(50, top_k=1)) == {ORDER[0]}


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    kept, total = [], 0.0
    for token in ORDER:
        kept.append(token)
        total += float(PROBS[token])
        if total >= 0.8:
            break
    assert set(draws(4000, top_p=0.8)) == set(kept)
    assert set(draws(50, top_p=1e-6)) == {ORDER[0]}


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    kept = {token for token in range(VOCABULARY) if PROBS[token] >= 0.2 * PROBS[ORDER[0]]}
    assert set(draws(4000, min_p=0.2)) == kept


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = [
        request_of(seed=3),
        request_of(seed=3, top_p=0.9),
        request_of(temperature=0.0),
        request_of(seed=4, top_k=5, min_p=0.1),
        request_of(seed=5, temperature=2.0, repetition_penalty=1.5, prompt=ORDER[:4]),
    ]
    assert choose(*rows) == [choose(row)[0] for row in rows]
    assert choose(*reversed(rows)) == [choose(row)[0] for row in reversed(rows)]


def test_the_place_in_the_output_changes_the_draw() -> None:
    tokens = {choose(request_of(seed=1, output=[2] * count))[0] for count in range(30)}
    assert len(tokens) > 3


def test_draws_are_uniform_and_differ_by_seed_and_place() -> None:
    values = [uniform(seed, place) for seed in range(100) for place in range(100)]
    assert len(set(values)) == len(values)
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert abs(float(np.mean(values)) - 0.5) < 0.01


def test_a_repetition_penalty_counts_prompt_and_output() -> None:
    seen = [token for token in ORDER[:3] if LOGITS[token] > 0]
    assert len(seen) == 3
    for prompt, output in ((seen, []), ([1], seen)):
        assert choose(request_of(prompt, output, temperature=0.0, repetition_penalty=100.0)) == [ORDER[3]]
    low = [int(LOGITS.argmin())]
    request = request_of(low, temperature=0.0, repetition_penalty=2.0, logprobs=0)
    adjusted = LOGITS.clone()[None]
    sample(adjusted, [request], frozenset())
    assert adjusted[0, low[0]] == LOGITS[low[0]] * 2


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    best = ORDER[0]
    for penalty in ("presence_penalty", "frequency_penalty"):
        params: dict[str, Any] = {"temperature": 0.0, penalty: 100.0}
        assert choose(request_of([best], **params)) == [best]
        assert choose(request_of([1], [best], **params)) == [ORDER[1]]
    adjusted = LOGITS.clone()[None]
    both = request_of([1], [best] * 3, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    sample(adjusted, [both], frozenset())
    assert float(adjusted[0, best]) == pytest.approx(float(LOGITS[best]) - 0.5 - 3 * 0.25)


def test_no_end_before_min_tokens() -> None:
    best, second = ORDER[:2]
    eos = frozenset({best})
    early: dict[str, Any] = {"temperature": 0.0, "min_tokens": 3, "output": [5, 5]}
    assert choose(request_of(**early), eos=eos) == [second]
    assert choose(request_of(**early, stop_token_ids=(second,)), eos=eos) == [ORDER[2]]
    assert choose(request_of(**early, ignore_eos=True), eos=eos) == [best]
    assert choose(request_of(**(early | {"output": [5, 5, 5]})), eos=eos) == [best]


def test_logprobs_are_the_models_own() -> None:
    logits = LOGITS.repeat(2, 1)
    rows = [request_of(seed=9, temperature=0.5, presence_penalty=1.0, output=[3], logprobs=4), request_of(seed=9)]
    tokens, reports = sample(logits, rows, frozenset())
    report = reports[0]
    assert reports[1] is None
    assert isinstance(report, TokenLogprobs)
    assert report.token_id == tokens[0]
    assert report.logprob == pytest.approx(float(PROBS[tokens[0]].log()), abs=1e-4)
    assert report.rank == ORDER.index(tokens[0]) + 1
    assert [token for token, _ in report.top] == ORDER[:4]
    assert [value for _, value in report.top] == pytest.approx(PROBS[ORDER[:4]].log().tolist(), abs=1e-4)


def test_no_logprobs_beside_the_sampled_one_where_none_are_wanted() -> None:
    _, (report,) = sample(LOGITS[None].clone(), [request_of(temperature=0.0, logprobs=0)], frozenset())
    assert report is not None
    assert report.top == ()
    assert report.rank == 1

"""Token ids to text, choice by choice, with the demo model's own tokenizer and detokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.calls import Choice, Delta, SamplingRequest
from deployments.generation import ChoiceText, choice_params, deltas, join, merge
from engine.protocol import EngineOutput, FinishReason, SamplingParams, TokenLogprobs
from renderer.detokenizer import IncrementalDetokenizer
from renderer.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "demo" / "model"
END = 756  # <|im_end|>
STORY = "The cat sat on the mat. Ünïcode: 猫 and 🐈, then the dog came."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(MODEL), None, False)


def text_of(tokenizer: Tokenizer, sampling: SamplingRequest, prior: tuple[int, ...] = ()) -> ChoiceText:
    detokenizer = IncrementalDetokenizer(
        tokenizer,
        stop=sampling.stop,
        skip_special_tokens=sampling.skip_special_tokens,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        min_tokens=sampling.min_tokens,
    )
    return ChoiceText(Choice(0, prior), sampling, detokenizer, lambda ids: tokenizer.decode(ids, False))


def outputs_of(ids: Sequence[int], size: int, finish: FinishReason, stop: int | None = None) -> list[EngineOutput]:
    """The tokens in outputs of `size` each; the last one ends the choice."""
    groups = [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]
    last = len(groups) - 1
    return [
        EngineOutput(group, finish if place == last else None, stop if place == last else None, 3)
        for place, group in enumerate(groups)
    ]


async def stream(outputs: Sequence[EngineOutput]) -> AsyncGenerator[EngineOutput]:
    for output in outputs:
        await asyncio.sleep(0)
        yield output


async def collected(outputs: Sequence[EngineOutput], text: ChoiceText, every: int = 1) -> list[Delta]:
    return [delta async for delta in deltas(stream(outputs), text, every)]


async def test_the_token_that_completes_a_grammar_is_text(tokenizer: Tokenizer) -> None:
    outputs = outputs_of(tokenizer.encode('{"a":1}', False), 1, "stop")
    for kept, text in ((True, '{"a":1}'), (False, '{"a":1')):
        ended = [*outputs[:-1], replace(outputs[-1], last_is_text=kept)]
        given = await collected(ended, text_of(tokenizer, SamplingRequest()))
        assert "".join(delta.text for delta in given) == text
        assert given[-1].finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
async def test_the_text_is_whole_however_the_tokens_are_grouped(tokenizer: Tokenizer, size: int) -> None:
    ids = [*tokenizer.encode(STORY, False), END]
    text = text_of(tokenizer, SamplingRequest())
    found = await collected(outputs_of(ids, size, "stop"), text)
    assert "".join(delta.text for delta in found) == STORY
    assert [token for delta in found for token in delta.token_ids] == ids
    assert (found[-1].finish_reason, found[-1].stop_reason, text.cached_tokens) == ("stop", None, 3)
    assert [delta.finish_reason for delta in found[:-1]] == [None] * (len(found) - 1)


async def test_no_delta_holds_half_a_character(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("🐈", False), END]
    found = await collected(outputs_of(ids, 1, "stop"), text_of(tokenizer, SamplingRequest()))
    assert len(ids) > 2
    assert [delta.text for delta in found if delta.text] == ["🐈"]


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_a_stop_string_ends_text_and_tokens_where_it_is_complete(tokenizer: Tokenizer, size: int) -> None:
    ids = tokenizer.encode(STORY, False)
    text = text_of(tokenizer, SamplingRequest(stop=("mat", "never")))
    found = await collected(outputs_of(ids, size, "length"), text)
    assert "".join(delta.text for delta in found) == "The cat sat on the "
    assert (found[-1].finish_reason, found[-1].stop_reason) == ("stop", "mat")
    used = [token for delta in found for token in delta.token_ids]
    assert used == ids[: len(used)]
    assert tokenizer.decode(used, False).rstrip(".").endswith("mat")


async def test_a_stop_string_is_kept_on_request(tokenizer: Tokenizer) -> None:
    text = text_of(tokenizer, SamplingRequest(stop=("mat",), include_stop_str_in_output=True))
    found = await collected(outputs_of(tokenizer.encode(STORY, False), 1, "length"), text)
    assert "".join(delta.text for delta in found) == "The cat sat on the mat"


async def test_the_text_of_a_stop_token_is_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The cat", False)
    for include, expected in ((False, tokenizer.decode(ids[:-1], False)), (True, "The cat")):
        text = text_of(tokenizer, SamplingRequest(stop_token_ids=(ids[-1],), include_stop_str_in_output=include))
        found = await collected(outputs_of(ids, 1, "stop", ids[-1]), text)
        assert "".join(delta.text for delta in found) == expected
        assert (found[-1].stop_reason, found[-1].finish_reason) == (ids[-1], "stop")
        assert sum(len(delta.token_ids) for delta in found) == len(ids)


@pytest.mark.parametrize("stop", [(), ("the dog",)])
async def test_a_choice_goes_on_where_another_replica_left_it(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    ids, sampling = [*tokenizer.encode(STORY, False), END], SamplingRequest(stop=stop)
    whole = await collected(outputs_of(ids, 1, "stop"), text_of(tokenizer, sampling))
    for received in range(len(whole)):
        seen = whole[:received]
        prior = tuple(token for delta in seen for token in delta.token_ids)
        rest = await collected(outputs_of(ids[len(prior) :], 4, "stop"), text_of(tokenizer, sampling, prior))
        assert "".join(delta.text for delta in (*seen, *rest)) == "".join(delta.text for delta in whole)
        assert sum(len(delta.token_ids) for delta in rest) == sum(len(delta.token_ids) for delta in whole[received:])


async def test_tokens_are_collected_before_they_are_sent(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(STORY, False)
    found = await collected(outputs_of(ids, 1, "length"), text_of(tokenizer, SamplingRequest()), every=8)
    assert [len(delta.token_ids) for delta in found[:-1]] == [8] * (len(found) - 1)
    assert "".join(delta.text for delta in found) == STORY


async def test_logprobs_name_tokens_by_their_text(tokenizer: Tokenizer) -> None:
    (cat,) = tokenizer.encode("The", False)[:1]
    reported = TokenLogprobs(cat, -0.5, 1, ((cat, -0.5), (END, -1.5)))
    output = EngineOutput((cat,), "length", None, 0, (reported,))
    (delta,) = await collected([output], text_of(tokenizer, SamplingRequest()))
    (entry,) = delta.logprobs
    assert (entry.logprob, [top.token for top in entry.top]) == (-0.5, [entry.token, "<|im_end|>"])


def test_every_choice_of_a_seeded_request_draws_its_own_numbers() -> None:
    seeded = SamplingParams(max_tokens=1, seed=5)
    assert [choice_params(seeded, index).seed for index in range(3)] == [5, 6, 7]
    assert choice_params(SamplingParams(max_tokens=1), 2).seed is None


def test_deltas_join_in_order() -> None:
    joined = join(Delta(1, "a", (1,)), Delta(1, "b", (2, 3), "stop", "x"))
    assert joined == Delta(1, "ab", (1, 2, 3), "stop", "x")


async def test_streams_merge_as_their_items_come() -> None:
    async def numbers(first: int) -> AsyncGenerator[int]:
        for number in range(first, first + 3):
            await asyncio.sleep(0)
            yield number

    found = [number async for number in merge([numbers(0), numbers(10)])]
    assert sorted(found) == [0, 1, 2, 10, 11, 12]
    assert found.index(2) > found.index(0)


@pytest.mark.parametrize("count", [1, 3])
async def test_every_merged_stream_is_closed_when_the_reader_leaves_or_one_fails(count: int) -> None:
    closed = []

    async def endless(number: int) -> AsyncGenerator[int]:
        try:
            while True:
                await asyncio.sleep(0)
                yield number
        finally:
            closed.append(number)

    async def failing() -> AsyncGenerator[int]:
        for number in (0, 1):
            await asyncio.sleep(0)
            if number:
                raise ValueError("broken")
            yield number

    merged = merge([endless(number) for number in range(count)])
    assert await anext(merged) == 0
    await merged.aclose()
    assert sorted(closed) == list(range(count))
    closed.clear()
    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([*(endless(number) for number in range(count)), failing()]):
            pass
    assert sorted(closed) == list(range(count))

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import pytest

from engine.continuation import Continuation, continued, plan_continuation
from engine.protocol import EngineOutput, SamplingParams
from renderer.errors import EngineError

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, min_tokens=4)
SCHEMA = {"type": "object"}
Run = Callable[[Continuation], AsyncGenerator[EngineOutput]]


def test_greedy_output_becomes_part_of_the_prompt() -> None:
    plan = plan_continuation(GREEDY, [7, 8, 9])
    assert (plan.appended, plan.repeated) == ((7, 8, 9), ())
    assert (plan.params.max_tokens, plan.params.min_tokens) == (7, 1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=10, seed=1),
        SamplingParams(max_tokens=10, temperature=0.0, structured=SCHEMA),
        SamplingParams(max_tokens=10, temperature=0.0, presence_penalty=0.5),
        SamplingParams(max_tokens=10, seed=1, frequency_penalty=0.5),
    ],
)
def test_output_that_depends_on_its_beginning_is_generated_again(params: SamplingParams) -> None:
    assert plan_continuation(params, [7, 8]) == Continuation((), (7, 8), params)


def test_sampled_output_of_a_schema_needs_a_seed_to_go_on() -> None:
    with pytest.raises(EngineError, match="seed"):
        plan_continuation(SamplingParams(max_tokens=10, structured=SCHEMA), [7])


def engine_with(*chunks: tuple[int, ...]) -> Run:
    async def run(plan: Continuation) -> AsyncGenerator[EngineOutput]:
        for index, chunk in enumerate(chunks):
            yield EngineOutput(chunk, "length" if index == len(chunks) - 1 else None)

    return run


async def collected(params: SamplingParams, prior: list[int], run: Run) -> list[EngineOutput]:
    return [output async for output in continued(params, prior, run)]


async def test_what_is_known_is_left_out_whatever_the_chunks() -> None:
    params = SamplingParams(max_tokens=5, seed=3)
    outputs = await collected(params, [1, 2, 3], engine_with((1, 2), (3, 4), (5,)))
    assert [output.token_ids for output in outputs] == [(4,), (5,)]
    assert outputs[-1].finish_reason == "length"


async def test_an_engine_that_generates_something_else_is_found_out() -> None:
    with pytest.raises(EngineError, match="does not generate again"):
        await collected(SamplingParams(max_tokens=5, seed=3), [1, 2, 3], engine_with((1, 9), (3, 4)))


async def test_nothing_is_left_to_do_after_the_last_token() -> None:
    outputs = await collected(SamplingParams(max_tokens=2), [1, 2], engine_with((3,)))
    assert outputs == [EngineOutput((), "length")]

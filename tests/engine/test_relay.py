"""However a request ends, it is counted, its items are let go of, and nothing is kept of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import pytest

from engine.continuation import Continuation
from engine.protocol import EngineOutput, SamplingParams
from engine.relay import Relay
from engine.requests import UnderWay
from renderer.caches import SenderCache
from renderer.errors import ContextLengthError, EngineDeadError, EngineStartingError, RequestError
from renderer.prompt import RenderedPrompt

PARAMS = SamplingParams(max_tokens=4, temperature=0.0)


def prompt_of(tokens: int = 3) -> RenderedPrompt:
    lease = SenderCache(100).lease()
    lease.cache.look_up("picture", lease)
    return RenderedPrompt(tuple(range(tokens)), lease=lease)


async def well(plan: Continuation, request: UnderWay) -> AsyncGenerator[EngineOutput]:
    for place in range(plan.params.max_tokens):
        async with request.step():
            await asyncio.sleep(0)
        yield EngineOutput((place,), "length" if place == plan.params.max_tokens - 1 else None)


async def dies(plan: Continuation, request: UnderWay) -> AsyncGenerator[EngineOutput]:
    yield EngineOutput((1,))
    raise EngineDeadError("gone")


def limit() -> int:
    return 16


def not_up() -> int:
    raise EngineStartingError("not up")


def is_over(relay: Relay, prompt: RenderedPrompt) -> bool:
    return prompt.lease is not None and prompt.lease.closed and not relay.requests._by_id


async def test_what_came_is_counted_and_what_another_streamed_is_not() -> None:
    relay, prompt = Relay(limit), prompt_of()
    outputs = [output async for output in relay.generate(prompt, PARAMS, "r", (7, 8), well)]
    assert [output.token_ids for output in outputs] == [(0,), (1,)]
    counted = relay.counters
    assert (counted.requests, counted.prompt_tokens, counted.output_tokens, counted.aborted) == (1, 3, 2, 0)
    assert is_over(relay, prompt)


async def test_an_abort_ends_a_request_with_that_reason() -> None:
    relay, prompt = Relay(limit), prompt_of()
    reasons = []
    async for output in relay.generate(prompt, PARAMS, "r", (), well):
        reasons.append(output.finish_reason)
        relay.requests.abort("r")
    assert reasons == [None, "abort"]
    assert relay.counters.aborted == 1
    assert is_over(relay, prompt)


MANY_STOPS = replace(PARAMS, stop_token_ids=tuple(range(1000)))


@pytest.mark.parametrize(
    ("relay", "tokens", "params", "error"),
    [
        (Relay(not_up), 3, PARAMS, EngineStartingError),
        (Relay(limit), 13, PARAMS, ContextLengthError),
        (Relay(limit), 3, replace(MANY_STOPS, min_tokens=1), RequestError),
    ],
    ids=["not up", "too long", "too many ends to hold back"],
)
async def test_what_cannot_begin_is_not_counted(
    relay: Relay, tokens: int, params: SamplingParams, error: type[Exception]
) -> None:
    prompt = prompt_of(tokens)
    with pytest.raises(error):
        await anext(relay.generate(prompt, params, "r", (), well))
    assert relay.counters.requests == 0
    assert is_over(relay, prompt)


async def test_stop_tokens_of_any_number_are_taken_where_none_is_held_back() -> None:
    assert [output async for output in Relay(limit).generate(prompt_of(), MANY_STOPS, "r", (), well)]


async def test_who_leaves_or_outlives_the_other_program_leaves_nothing_behind() -> None:
    relay, left, lost = Relay(limit), prompt_of(), prompt_of()
    async with aclosing(relay.generate(left, PARAMS, "left", (), well)) as outputs:
        await anext(outputs)
    with pytest.raises(EngineDeadError):
        [output async for output in relay.generate(lost, PARAMS, "lost", (), dies)]
    assert is_over(relay, left)
    assert is_over(relay, lost)
    assert relay.counters.output_tokens == 2

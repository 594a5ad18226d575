from collections.abc import AsyncGenerator, Sequence
from typing import Any

import orjson
import pytest

from deployments.answers.completions import ChatForm, Head, TextForm, begun, whole
from deployments.calls import Delta, Event, LogprobEntry, Served, Started
from renderer.errors import EngineDeadError, RequestError

HEAD = Head("id", "model", 1)
SERVED = Served("engine", "replica", {"render": 0.5})
EVENTS: tuple[Event, ...] = (
    Started(SERVED, 10, 4),
    Delta(0, "Hel", (1,), logprobs=(LogprobEntry("Hel", -0.5),)),
    Delta(1, "", (7,)),
    Delta(0, "", (2,)),
    Delta(0, "lo", (3,), "stop", None, (LogprobEntry("lo", -0.25),)),
    Delta(1, "x", (8, 9), "stop", "END"),
)


async def stream(events: Sequence[Event] = EVENTS) -> AsyncGenerator[Event]:
    for event in events:
        yield event


async def chunks(form: Any, **options: bool) -> list[Any]:
    reply = await begun(stream(), form, **options)
    assert reply.served == SERVED
    return [orjson.loads(orjson.dumps(chunk)) async for chunk in reply.value]


async def test_a_whole_chat_answer() -> None:
    reply = await whole(stream(), ChatForm(HEAD))
    answer = orjson.loads(orjson.dumps(reply.value))
    assert reply.served == SERVED
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hello", "x"]
    assert [choice["stop_reason"] for choice in answer["choices"]] == [None, "END"]
    assert answer["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 6,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": None,
    }
    assert answer["object"] == "chat.completion"


async def test_a_whole_text_answer_has_its_logprobs_in_the_older_form() -> None:
    answer = (await whole(stream(), TextForm(HEAD))).value
    assert answer.choices[0].logprobs == {
        "tokens": ["Hel", "lo"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{}, {}],
        "text_offset": [0, 3],
    }


async def test_several_prompts_add_up() -> None:
    answer = (await whole(stream([*EVENTS, Started(SERVED, 5, 0), Delta(2, "y", (1,), "stop")]), TextForm(HEAD))).value
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (15, 7)


async def test_cached_tokens_that_the_engine_tells_of_at_the_end_are_in_the_usage() -> None:
    events = (Started(SERVED, 10, 0), Delta(0, "a", (1,)), Delta(0, "b", (2,), "stop", late_cached_tokens=6))
    reply = await begun(stream(events), ChatForm(HEAD), include_usage=True)
    *_, last = [chunk async for chunk in reply.value]
    answer = await whole(stream([*events, *events]), ChatForm(HEAD))
    for told, cached in ((last, 6), (answer.value, 12)):
        assert told.usage is not None
        assert told.usage.prompt_tokens_details is not None
        assert told.usage.prompt_tokens_details.cached_tokens == cached


async def test_chunks_of_a_chat() -> None:
    found = await chunks(ChatForm(HEAD))
    choices = [chunk["choices"][0] for chunk in found]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": "Hel"},
        {"role": "assistant", "content": ""},
        {"content": "lo"},
        {"content": "x"},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop", "stop"]
    assert {chunk["id"] for chunk in found} == {"id"}
    assert [chunk["usage"] for chunk in found] == [None] * 4


async def test_usage_comes_in_a_chunk_of_its_own_or_in_each() -> None:
    *_, last = await chunks(ChatForm(HEAD), include_usage=True)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 6)
    running = await chunks(TextForm(HEAD), continuous_usage=True)
    assert [chunk["usage"]["completion_tokens"] for chunk in running] == [1, 2, 4, 6]


async def test_chunks_of_a_text_count_its_characters() -> None:
    found = await chunks(TextForm(HEAD))
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in found if chunk["choices"][0]["logprobs"]]
    assert offsets == [[0], [3]]


async def test_an_error_before_the_first_token_is_not_part_of_the_stream() -> None:
    async def refused() -> AsyncGenerator[Event]:
        for event in EVENTS:
            if event is EVENTS[0]:
                raise RequestError("no")
            yield event

    with pytest.raises(RequestError):
        await begun(refused(), ChatForm(HEAD))
    with pytest.raises(EngineDeadError):
        await begun(stream(EVENTS[:1]), ChatForm(HEAD))
    with pytest.raises(EngineDeadError):
        await whole(stream([]), ChatForm(HEAD))


async def test_the_events_are_closed_when_the_reader_leaves() -> None:
    closed = []

    async def endless() -> AsyncGenerator[Event]:
        try:
            for event in EVENTS * 100:
                yield event
        finally:
            closed.append(True)

    reply = await begun(endless(), ChatForm(HEAD))
    await anext(reply.value)
    await reply.value.aclose()
    assert closed == [True]

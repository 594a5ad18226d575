"""Nothing that came is lost to a slow reader, and an error comes after what came before it."""

import asyncio

import pytest

from engine.protocol import EngineOutput, TokenLogprobs
from engine.stream import Stream
from renderer.errors import EngineDeadError


def new_stream() -> Stream:
    return Stream("test", asyncio.get_running_loop())


async def test_outputs_are_joined_until_they_are_read() -> None:
    stream = new_stream()
    stream.push(EngineOutput((1,), num_cached_tokens=4, logprobs=(TokenLogprobs(1, -0.5, 1),)))
    stream.push(EngineOutput((2,), num_cached_tokens=4, logprobs=(TokenLogprobs(2, -0.25, 1),)))
    first = await stream.next()
    assert first.token_ids == (1, 2)
    assert [entry.token_id for entry in first.logprobs] == [1, 2]
    assert not stream.ended
    stream.push(EngineOutput((3,), "stop", 3, 4))
    last = await stream.next()
    assert (last.token_ids, last.finish_reason, last.stop_reason, last.num_cached_tokens) == ((3,), "stop", 3, 4)
    assert stream.ended


async def test_a_reader_waits_for_the_next_output() -> None:
    stream = new_stream()
    reader = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    assert not reader.done()
    stream.push(EngineOutput((1,)))
    assert (await reader).token_ids == (1,)


async def test_an_error_comes_after_what_came_before_it() -> None:
    stream = new_stream()
    stream.push(EngineOutput((1,)))
    stream.push(EngineDeadError("gone"))
    assert (await stream.next()).token_ids == (1,)
    with pytest.raises(EngineDeadError):
        await stream.next()
    assert stream.ended

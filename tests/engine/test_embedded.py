"""The embedded engine as its replica uses it: a core process, streams, aborts, caches that agree, deaths."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import pytest

from engine.config import EngineConfig
from engine.embedded import EmbeddedEngine
from engine.messages import Outputs
from engine.protocol import EngineOutput, EngineStats, SamplingParams
from renderer.errors import (
    CacheMissError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineStartingError,
    RequestError,
)
from renderer.prompt import RenderedPrompt
from tests.checkpoints import checkpoint
from tests.engine.builders import GREEDY, Lab, Picture, Text, engine_config, lab, lend, with_other_weights

FAMILY = "qwen2_5_vl"
LONG = dataclasses.replace(GREEDY, max_tokens=900)
SEEDED = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
ITEM_BYTES = sum(tensor.nbytes for tensor in (lab(FAMILY).prompt(Picture(0)).items[0].tensors or {}).values())
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def engine() -> Iterator[EmbeddedEngine]:
    """One engine for many tests, with room for three pictures in its receiver cache. It serves any event loop."""
    engine = EmbeddedEngine(engine_config(checkpoint(FAMILY), mm_cache_bytes=3 * ITEM_BYTES))
    asyncio.run(engine.start())
    yield engine
    asyncio.run(engine.close())


async def answer(
    engine: EmbeddedEngine, prompt: RenderedPrompt, params: SamplingParams = GREEDY, prior: tuple[int, ...] = ()
) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    async for output in engine.generate(prompt, params, request_id="test", prior_output_ids=prior):
        tokens += output.token_ids
    return tokens


def stream(engine: EmbeddedEngine, prompt: RenderedPrompt, request_id: str = "test") -> AsyncGenerator[EngineOutput]:
    return cast(AsyncGenerator[EngineOutput], engine.generate(prompt, LONG, request_id=request_id))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110  # the core is another process, which sets no event
            await asyncio.sleep(0.01)


async def idle_stats(engine: EmbeddedEngine) -> EngineStats:
    """Once the core has nothing left to do."""

    async def is_idle() -> bool:
        stats = await engine.stats()
        return stats.running == stats.waiting == 0

    await until(is_idle)
    return await engine.stats()


async def test_sixteen_requests_at_once_answer_as_each_alone(engine: EmbeddedEngine) -> None:
    prompts = [
        lab(FAMILY).prompt(Text(3 + 5 * index, index), *([Picture(index % 3)] * (index % 3)), Text(2, 50))
        for index in range(16)
    ]
    answers = await asyncio.gather(*(answer(engine, lend(prompt, engine.sender_cache)) for prompt in prompts))
    assert list(answers) == [lab(FAMILY).alone(prompt, GREEDY.max_tokens) for prompt in prompts]


async def test_a_known_picture_is_neither_sent_nor_encoded_nor_computed_again(engine: EmbeddedEngine) -> None:
    first = lab(FAMILY).prompt(Text(20, 100), Picture(100), Text(5, 101))
    answered = await answer(engine, lend(first, engine.sender_cache))
    before, hits = await engine.stats(), engine.sender_cache.stats.hits
    # The next turn of the conversation: the same beginning, the answer, another question.
    second = dataclasses.replace(first, token_ids=(*first.token_ids, *answered, 30, 31, 32))
    outputs = [output async for output in engine.generate(lend(second, engine.sender_cache), GREEDY, request_id="2")]
    after = await engine.stats()
    assert engine.sender_cache.stats.hits == hits + 1
    assert after.tensors_received == before.tensors_received
    assert after.encoder_runs == before.encoder_runs
    known = (len(first.token_ids) + len(answered) - 1) // 8 * 8
    assert outputs[0].num_cached_tokens == known
    assert after.cached_tokens - before.cached_tokens == known
    tokens = tuple(token for output in outputs for token in output.token_ids)
    assert tokens == lab(FAMILY).alone(second, GREEDY.max_tokens)


@pytest.mark.parametrize("params", [GREEDY, SEEDED])
async def test_another_replica_continues_a_stream_at_any_token(engine: EmbeddedEngine, params: SamplingParams) -> None:
    prompt = lab(FAMILY).prompt(Text(6, 1), Picture(1), Text(3, 2))
    whole = await answer(engine, prompt, params)
    assert len(whole) == params.max_tokens
    rests = await asyncio.gather(*(answer(engine, prompt, params, prior=whole[:cut]) for cut in range(len(whole) + 1)))
    assert [whole[:cut] + rest for cut, rest in enumerate(rests)] == [whole] * (len(whole) + 1)


async def test_a_seed_gives_the_same_text_in_any_company(engine: EmbeddedEngine) -> None:
    prompt = lab(FAMILY).prompt(Text(9, 3))
    alone = await answer(engine, prompt, SEEDED)
    crowd = [lab(FAMILY).prompt(Text(4 + index, 60 + index)) for index in range(12)]
    other = dataclasses.replace(SEEDED, seed=8, top_p=1.0)
    together, *_ = await asyncio.gather(answer(engine, prompt, SEEDED), *(answer(engine, one, other) for one in crowd))
    assert together == alone
    assert await answer(engine, prompt, other) != alone


async def test_closing_a_stream_ends_its_request_and_frees_its_blocks(engine: EmbeddedEngine) -> None:
    before = await idle_stats(engine)
    prompt = lend(lab(FAMILY).prompt(Picture(5), Text(9, 5)), engine.sender_cache)
    async with aclosing(stream(engine, prompt)) as outputs:
        await anext(outputs)
        assert (await engine.stats()).blocks_used > 0
    after = await engine.stats()
    assert (after.running, after.blocks_used, after.aborted) == (0, 0, before.aborted + 1)
    assert engine.sender_cache.stats.pinned == 0


async def test_cancelling_a_reader_ends_its_request(engine: EmbeddedEngine) -> None:
    before = await idle_stats(engine)
    reader = asyncio.create_task(answer(engine, lab(FAMILY).prompt(Text(5, 5)), LONG))

    async def is_running() -> bool:
        return (await engine.stats()).running == 1

    await until(is_running)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    after = await engine.stats()
    assert (after.running, after.blocks_used, after.aborted) == (0, 0, before.aborted + 1)


async def test_abort_ends_the_stream_with_that_reason(engine: EmbeddedEngine) -> None:
    async with aclosing(stream(engine, lab(FAMILY).prompt(Text(5, 6)), "doomed")) as outputs:
        await anext(outputs)
        await engine.abort("doomed")
        await engine.abort("unknown")
        reasons = [output.finish_reason async for output in outputs]
    assert reasons[-1] == "abort"
    assert (await engine.stats()).blocks_used == 0


async def test_a_slow_reader_gets_everything_in_few_outputs(engine: EmbeddedEngine) -> None:
    prompt = lab(FAMILY).prompt(Text(8, 8))
    params = dataclasses.replace(GREEDY, max_tokens=40, logprobs=2)
    async with aclosing(cast(AsyncGenerator[EngineOutput], engine.generate(prompt, params, request_id="s"))) as outputs:
        first = await anext(outputs)
        await idle_stats(engine)
        rest = [output async for output in outputs]
    assert len(rest) < 39
    tokens = [token for output in (first, *rest) for token in output.token_ids]
    assert tuple(tokens) == lab(FAMILY).alone(prompt, 40)
    assert [entry.token_id for output in (first, *rest) for entry in output.logprobs] == tokens
    assert rest[-1].finish_reason == "length"


async def test_a_malformed_item_is_an_error_of_its_request_alone(engine: EmbeddedEngine) -> None:
    good = lab(FAMILY).prompt(Text(4, 9), Picture(9), Text(4, 10))
    (item,) = good.items
    grid = np.array([1, 400, 400], dtype=np.int64)
    lying = dataclasses.replace(item, cache_key="lie", tensors=dict(item.tensors or {}) | {"image_grid_thw": grid})
    bad = dataclasses.replace(good, items=(lying,))
    results = await asyncio.gather(
        *(answer(engine, lend(prompt, engine.sender_cache)) for prompt in (good, bad, good, bad)),
        return_exceptions=True,
    )
    right = lab(FAMILY).alone(good, GREEDY.max_tokens)
    assert results[0] == results[2] == right
    assert all(type(results[index]) is RequestError for index in (1, 3))
    assert await answer(engine, lend(good, engine.sender_cache)) == right


async def test_what_could_never_run_is_refused(engine: EmbeddedEngine) -> None:
    with pytest.raises(ContextLengthError, match="1024"):
        await answer(engine, lab(FAMILY).prompt(Text(1000)), dataclasses.replace(GREEDY, max_tokens=25))
    with pytest.raises(RequestError, match="no tokens"):
        await answer(engine, RenderedPrompt(()))
    with pytest.raises(RequestError, match="vocabulary"):
        await answer(engine, RenderedPrompt((5, 1 << 20)))
    assert engine.max_model_len == 1024


async def test_what_does_not_fit_now_waits(engine: EmbeddedEngine) -> None:
    """Eight requests that reserve half of the blocks each."""
    params = dataclasses.replace(GREEDY, max_tokens=700, min_tokens=0, stop_token_ids=tuple(range(0, 480, 2)))
    prompts = [lab(FAMILY).prompt(Text(300, 30 + index)) for index in range(8)]
    answers = await asyncio.gather(*(answer(engine, prompt, params) for prompt in prompts))
    assert all(answers)
    assert (await engine.stats()).blocks_used == 0


async def test_an_item_that_is_not_held_is_refused_and_nothing_is_submitted(engine: EmbeddedEngine) -> None:
    before = await engine.stats()
    with pytest.raises(CacheMissError):
        await answer(engine, lab(FAMILY).prompt(Picture(77)).layout())
    assert (await engine.stats()).requests == before.requests


async def test_reset_cache_empties_every_cache_but_keeps_what_is_pinned(engine: EmbeddedEngine) -> None:
    prompt, running = lab(FAMILY).prompt(Text(30, 40), Picture(40)), lab(FAMILY).prompt(Picture(41), Text(5, 41))
    right = await answer(engine, lend(prompt, engine.sender_cache))
    async with aclosing(stream(engine, lend(running, engine.sender_cache))) as outputs:
        await anext(outputs)
        await engine.reset_cache()
        assert engine.sender_cache.keys() == (running.items[0].cache_key,)
        assert (await engine.stats()).receiver_items == 1
    before = await engine.stats()
    assert await answer(engine, lend(prompt, engine.sender_cache)) == right
    after = await engine.stats()
    assert after.receiver_items == len(engine.sender_cache.keys()) == 1
    assert after.encoder_runs == before.encoder_runs + 1
    assert after.cached_tokens == before.cached_tokens


async def test_forty_pictures_through_a_cache_of_three_never_mix(engine: EmbeddedEngine) -> None:
    """Sixteen clients, some of which go away before or after their submission."""
    await engine.reset_cache()
    before = await idle_stats(engine)
    every = (lab(FAMILY).prompt(Text(3, index % 4), Picture(200 + index), Text(4, 90)) for index in range(120))
    answers = {lab(FAMILY).alone(prompt, 6): prompt for prompt in every}  # an answer is about one picture or wrong
    right, prompts = list(answers)[:40], list(answers.values())[:40]
    assert len(right) == 40
    params = dataclasses.replace(GREEDY, max_tokens=6)

    async def client(number: int) -> None:
        dice = random.Random(number)
        for _ in range(12):
            index = dice.randrange(len(prompts)) if dice.random() < 0.7 else dice.randrange(4)
            prompt = lend(prompts[index], engine.sender_cache)
            await asyncio.sleep(0.002 * dice.random())
            task = asyncio.create_task(answer(engine, prompt, params))
            if dice.random() < 0.3:
                await asyncio.sleep(0.02 * dice.random())
                task.cancel()
            await asyncio.wait([task])
            if task.cancelled() and prompt.lease is not None:
                prompt.lease.close()  # a task that is cancelled before it begins has closed nothing
            assert task.cancelled() or task.result() == right[index]

    await asyncio.gather(*(client(number) for number in range(16)))
    after, sender = await idle_stats(engine), engine.sender_cache.stats
    assert sender.pinned == 0
    assert after.tensors_received - before.tensors_received == sender.misses
    assert after.receiver_items == sender.entries <= 3
    assert after.receiver_bytes == sender.bytes <= 3 * ITEM_BYTES
    assert sender.evictions > 0
    assert sender.uncached > 0
    assert after.blocks_used == 0


async def test_a_killed_core_ends_its_streams_at_once_and_comes_back_warm(engine: EmbeddedEngine) -> None:
    prompt = lab(FAMILY).prompt(Text(5, 70), Picture(70), Text(5, 71))
    right = await answer(engine, lend(prompt, engine.sender_cache))
    by_reference = lend(prompt, engine.sender_cache)
    assert by_reference.items[0].tensors is None
    outputs = stream(engine, lab(FAMILY).prompt(Text(5, 72)))
    await anext(outputs)
    (core,) = core_processes()
    os.kill(core.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        with pytest.raises(EngineDeadError):
            async for _ in outputs:
                pass
    assert engine.sender_cache.keys() == ()
    with pytest.raises(EngineStartingError):
        await engine.health()
    with pytest.raises(EngineStartingError):
        await answer(engine, prompt)

    async def is_back() -> bool:
        try:
            await engine.health()
        except EngineDeadError:
            return False
        return True

    await until(is_back)
    with pytest.raises(CacheMissError):
        await answer(engine, by_reference)
    assert engine.sender_cache.stats.pinned == 0
    assert await answer(engine, lend(prompt, engine.sender_cache)) == right
    stats = await engine.stats()
    assert stats.restarts == 1
    assert "decode_16" in stats.warmup_s
    assert not core.is_running()


async def test_reloaded_weights_answer_as_generate_does_and_nothing_is_sent_again(
    engine: EmbeddedEngine, tmp_path: Path
) -> None:
    other = with_other_weights(checkpoint(FAMILY), tmp_path / "other")
    prompt = lab(FAMILY).prompt(Text(5, 80), Picture(80), Text(5, 81))
    before, after = lab(FAMILY).alone(prompt, 10), Lab(other).alone(prompt, 10)
    assert before != after
    assert await answer(engine, lend(prompt, engine.sender_cache)) == before
    first = await idle_stats(engine)
    outputs = stream(engine, lab(FAMILY).prompt(Text(5, 82)))
    await anext(outputs)
    with pytest.raises(EngineError, match="requests"):
        await engine.reload(str(other))
    await outputs.aclose()
    await idle_stats(engine)
    with pytest.raises(RequestError, match="nowhere"):
        await engine.reload(str(tmp_path / "nowhere"))
    await engine.reload(str(other))
    assert await answer(engine, lend(prompt, engine.sender_cache)) == after
    second = await engine.stats()
    assert second.tensors_received == first.tensors_received
    assert second.encoder_runs == first.encoder_runs + 1
    (core,) = core_processes()
    os.kill(core.pid, signal.SIGKILL)
    await until(lambda: serves(engine, restarts=2))
    assert await answer(engine, lend(prompt, engine.sender_cache)) == after
    await engine.reload(None)
    assert await answer(engine, lend(prompt, engine.sender_cache)) == before


async def serves(engine: EmbeddedEngine, restarts: int) -> bool:
    return (await engine.stats()).restarts == restarts


async def test_a_question_that_nobody_waits_for_any_more_does_the_engine_no_harm(engine: EmbeddedEngine) -> None:
    asking = asyncio.create_task(engine.stats())
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    prompt = lab(FAMILY).prompt(Text(5, 83))
    assert await answer(engine, prompt) == lab(FAMILY).alone(prompt, 10)
    assert (await engine.stats()).restarts == 2


def large_schema() -> dict[str, object]:
    """Takes half a second to compile."""
    entries = {
        f"key{place}": {
            "type": "object",
            "properties": {
                f"part{part}": {"enum": [f"{place}-{part}-{end}" for end in range(60)]} for part in range(12)
            },
            "additionalProperties": False,
        }
        for place in range(80)
    }
    return {"type": "object", "properties": entries, "additionalProperties": False}


async def test_a_large_schema_stalls_nobody(engine: EmbeddedEngine) -> None:
    outputs = stream(engine, lab(FAMILY).prompt(Text(5, 84)))
    await anext(outputs)
    asked = dataclasses.replace(GREEDY, structured=large_schema(), max_tokens=4)
    structured = engine.generate(lab(FAMILY).prompt(Text(5, 85)), asked, request_id="structured")
    first = asyncio.ensure_future(anext(structured))
    decoded = 0
    while not first.done():
        decoded += len((await anext(outputs)).token_ids)
    assert decoded > 10
    assert len((await first).token_ids) > 0
    await outputs.aclose()
    await cast(AsyncGenerator[EngineOutput], structured).aclose()


async def test_a_request_can_be_aborted_while_its_schema_is_compiled(engine: EmbeddedEngine) -> None:
    asked = dataclasses.replace(GREEDY, structured={**large_schema(), "title": "another"})
    first = asyncio.ensure_future(
        anext(engine.generate(lab(FAMILY).prompt(Text(5, 86)), asked, request_id="structured"))
    )
    await until(lambda: is_waiting(engine))
    await engine.abort("structured")
    assert (await first).finish_reason == "abort"
    assert (await idle_stats(engine)).blocks_used == 0


async def is_waiting(engine: EmbeddedEngine) -> bool:
    return (await engine.stats()).waiting == 1


class Unsendable:
    def __reduce__(self) -> str:
        raise TypeError("not a message")


@pytest.mark.parametrize("fault", ["send", "take"])
async def test_whichever_of_its_threads_fails_the_core_ends_and_comes_back(
    engine: EmbeddedEngine, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one of them may end in silence: requests would wait for ever."""
    restarts = (await engine.stats()).restarts
    outputs = stream(engine, lab(FAMILY).prompt(Text(5, 87)))
    await anext(outputs)
    with monkeypatch.context() as patch:
        if fault == "take":
            patch.setattr(engine, "_deliver", failing_once(engine._deliver))
        else:
            prompt = dataclasses.replace(lab(FAMILY).prompt(Text(5, 88)), cache_salt=cast(str, Unsendable()))
            with pytest.raises(EngineDeadError):
                await answer(engine, prompt)
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(EngineDeadError):
                async for _ in outputs:
                    pass
    await until(lambda: serves(engine, restarts + 1))
    prompt = lab(FAMILY).prompt(Text(5, 83))
    assert await answer(engine, prompt) == lab(FAMILY).alone(prompt, 10)


def failing_once(deliver: Callable[[Outputs], None]) -> Callable[[Outputs], None]:
    calls = iter([True])

    def failing(message: Outputs) -> None:
        if next(calls, False):
            raise RuntimeError("a bug")
        deliver(message)

    return failing


async def test_a_core_that_hangs_ends_its_streams_and_another_takes_its_place(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (await engine.stats()).restarts
    outputs = stream(engine, lab(FAMILY).prompt(Text(5, 73)))
    await anext(outputs)
    (core,) = core_processes()
    core.suspend()
    monkeypatch.setattr(engine, "config", engine.config.model_copy(update={"stall_s": 0.3}))
    async with asyncio.timeout(DEADLINE_S):
        await engine.stats()
        with pytest.raises(EngineDeadError):
            async for _ in outputs:
                pass
    monkeypatch.undo()
    await until(lambda: serves(engine, restarts=before + 1))
    prompt = lab(FAMILY).prompt(Text(9, 74))
    assert await answer(engine, prompt) == lab(FAMILY).alone(prompt, GREEDY.max_tokens)
    assert not core.is_running()


async def test_a_core_that_takes_its_time_over_other_weights_does_not_hang(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await idle_stats(engine)
    restarts = (await engine.stats()).restarts
    (core,) = core_processes()
    core.suspend()
    loading = asyncio.create_task(engine.reload(None))
    monkeypatch.setattr(engine, "config", engine.config.model_copy(update={"stall_s": 0.1}))
    await asyncio.sleep(0)
    await engine.stats()
    core.resume()
    await loading
    monkeypatch.undo()
    assert (await engine.stats()).restarts == restarts


def core_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "engine.core" in child.cmdline()]


async def test_a_checkpoint_that_cannot_be_served_fails_the_start_and_leaves_no_process() -> None:
    before = set(core_processes())
    engine = EmbeddedEngine(EngineConfig(model=str(checkpoint("gemma3"))))
    with pytest.raises(ConfigError, match="gemma3"):
        await engine.start()
    await engine.close()
    assert set(core_processes()) == before


async def test_an_engine_that_was_never_started_can_be_closed() -> None:
    engine = EmbeddedEngine(engine_config(checkpoint(FAMILY)))
    with pytest.raises(EngineStartingError):
        await engine.health()
    await engine.close()

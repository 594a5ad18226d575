"""However a vLLM ends, its streams and calls end with it, as what may be tried elsewhere, and another is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from engine.protocol import EngineOutput
from renderer.errors import EngineDeadError
from tests.vllm.conftest import GREEDY, Rig, ids_of, kill_core, until_restarted

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = replace(GREEDY, max_tokens=3000)
ENDS_S = 60.0


async def stream(rig: Rig) -> AsyncGenerator[EngineOutput]:
    """A long one, which has begun."""
    outputs = rig.engine.generate(await rig.render("Long"), LONG, request_id="long")
    await anext(outputs)
    return outputs


async def read(outputs: AsyncGenerator[EngineOutput]) -> None:
    async for _ in outputs:
        pass


async def serves_again(rig: Rig, restarts: int, answer: tuple[int, ...]) -> None:
    await until_restarted(rig, restarts + 1)
    assert ids_of(await rig.ask(await rig.render("What is it?", 1), GREEDY)) == answer


async def test_calls_end_with_the_core_that_should_answer_them(rig: Rig) -> None:
    restarts = (await rig.engine.stats()).restarts
    answer = ids_of(await rig.ask(await rig.render("What is it?", 1), GREEDY))
    calls = [asyncio.create_task(rig.engine.reset_cache()), asyncio.create_task(rig.engine.reload(None))]
    kill_core()
    async with asyncio.timeout(ENDS_S):
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert all(end is None or isinstance(end, EngineDeadError) for end in ends)
    assert any(isinstance(end, EngineDeadError) for end in ends)
    await serves_again(rig, restarts, answer)


async def test_an_error_among_the_outputs_is_a_death(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever raises where vLLM hands outputs on ends its handler, and with it every stream."""
    restarts = (await rig.engine.stats()).restarts
    answer = ids_of(await rig.ask(await rig.render("What is it?", 1), GREEDY))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    outputs = await stream(rig)
    monkeypatch.setattr(rig.engine._serving().llm.logger_manager, "record", broken)
    with pytest.raises(EngineDeadError):
        async with asyncio.timeout(ENDS_S):
            await read(outputs)
    with pytest.raises(EngineDeadError):
        await rig.engine.health()
    await serves_again(rig, restarts, answer)


async def test_closing_ends_streams_that_still_run(rig: Rig) -> None:
    outputs = await stream(rig)
    reading = asyncio.create_task(read(outputs))
    await rig.engine.close()
    with pytest.raises(EngineDeadError):
        async with asyncio.timeout(ENDS_S):
            await reading

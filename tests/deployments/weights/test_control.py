"""What clients and trainers do to generations under way, over an engine that is a real one's stand-in for its clock:
it ends a request when the test says so."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from deployments.calls import Choice, GenerateCall, SamplingRequest
from deployments.weights.control import Control, bare_id, engine_id
from engine.protocol import EngineOutput, EngineStats, SamplingParams
from renderer.conversation import FeatureItem, FeaturesRequest
from renderer.prompt import PlaceholderRange, RenderedPrompt


class Held:
    """An engine whose requests run until they are let go."""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Future[str]] = {}
        self.submitted: Counter[str] = Counter()

    async def outputs(self, request_id: str) -> AsyncGenerator[EngineOutput]:
        self.submitted[request_id] += 1
        self.running[request_id] = asyncio.get_running_loop().create_future()
        try:
            yield EngineOutput((1,))
            reason = await self.running[request_id]
            yield EngineOutput((2,), "abort" if reason == "abort" else "stop")
        finally:
            del self.running[request_id]

    async def abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.running[request_id].set_result("abort")

    async def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running))

    def generate(
        self, prompt: RenderedPrompt, params: SamplingParams, *, request_id: str, prior_output_ids: Sequence[int] = ()
    ) -> AsyncIterator[EngineOutput]:
        return self.outputs(request_id)

    async def start(self) -> None: ...

    async def health(self) -> None: ...

    async def reset_cache(self) -> None: ...

    async def reload(self, path: str | None) -> None: ...

    async def close(self) -> None: ...


def call(name: str, choices: int = 1) -> GenerateCall:
    request = FeaturesRequest((1,), ())
    every = tuple(Choice(index) for index in range(choices))
    return GenerateCall(request, SamplingRequest(), every, f"uuid-{name}", False, client_id=name)


async def ended(control: Control, engine: Held, asked: GenerateCall, index: int = 0) -> str | None:
    name = engine_id(asked, index)
    reason = None
    with control.under_way(asked):
        async for output in control.run(asked, name, lambda: engine.outputs(name)):
            reason = output.finish_reason
    return reason


async def until_runs(engine: Held, count: int) -> None:
    async with asyncio.timeout(5):
        while len(engine.running) != count:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_request_is_aborted_by_any_of_its_names() -> None:
    for name in ("mine", "generate-tokens-mine", "chatcmpl-mine", "cmpl-mine"):
        engine = Held()
        control = Control(engine)
        one, two = (asyncio.create_task(ended(control, engine, call(own))) for own in ("mine", "other"))
        await until_runs(engine, 2)
        await control.abort([name, "unknown"])
        assert await one == "abort"
        assert not two.done()
        engine.running[engine_id(call("other"), 0)].set_result("stop")
        assert await two == "stop"


async def test_an_id_that_looks_like_an_answers_is_the_clients_own_too() -> None:
    """A render answer's id becomes the request's where it is sent on."""
    for name in ("chatcmpl-mine", "generate-tokens-chatcmpl-mine"):
        engine = Held()
        control = Control(engine)
        running = asyncio.create_task(ended(control, engine, call("chatcmpl-mine")))
        await until_runs(engine, 1)
        await control.abort([name])
        assert await running == "abort"


async def test_a_request_that_waits_can_be_aborted_and_never_reaches_the_engine() -> None:
    engine = Held()
    control = Control(engine)
    await control.pause()
    waiting = asyncio.create_task(ended(control, engine, call("mine")))
    await asyncio.sleep(0)
    await control.abort(["mine"])
    assert await waiting == "abort"
    assert not engine.submitted


async def test_pausing_waits_for_what_runs_and_holds_back_what_comes() -> None:
    engine = Held()
    control = Control(engine)
    first = asyncio.create_task(ended(control, engine, call("first")))
    await until_runs(engine, 1)
    pausing = asyncio.create_task(control.pause("wait"))
    await asyncio.sleep(0)
    second = asyncio.create_task(ended(control, engine, call("second")))
    await asyncio.sleep(0.05)
    assert not pausing.done()
    assert list(engine.running) == ["uuid-first-0"]
    engine.running["uuid-first-0"].set_result("stop")
    await pausing
    assert await first == "stop"
    assert not second.done()
    await control.resume()
    await until_runs(engine, 1)
    engine.running["uuid-second-0"].set_result("stop")
    assert await second == "stop"


async def test_pausing_can_abort_what_runs() -> None:
    engine = Held()
    control = Control(engine)
    running = asyncio.create_task(ended(control, engine, call("first")))
    await until_runs(engine, 1)
    await control.pause("abort")
    assert await running == "abort"


async def test_calls_that_are_equal_end_each_for_itself() -> None:
    control = Control(Held())
    tensors = {"pixel_values": np.zeros((4, 8), np.uint8)}
    request = FeaturesRequest((1, 2), (FeatureItem("hash", PlaceholderRange(0, 1), tensors),))
    calls = [replace(call("same"), request=request) for _ in range(2)]
    with control.under_way(calls[0]), control.under_way(calls[1]):
        pass
    assert not control._calls


async def test_nothing_is_left_of_requests_that_ended() -> None:
    engine = Held()
    control = Control(engine)
    tasks = [asyncio.create_task(ended(control, engine, call(str(number)))) for number in range(20)]
    await until_runs(engine, 20)
    await control.abort([str(number) for number in range(10)])
    for request_id in list(engine.running):
        if not engine.running[request_id].done():
            engine.running[request_id].set_result("stop")
    await asyncio.gather(*tasks)
    assert not control._calls
    assert not control._aborted
    assert not +control._submitted


@pytest.mark.parametrize(
    ("shown", "own"), [("chatcmpl-a", "a"), ("cmpl-cmpl-a", "cmpl-a"), ("generate-tokens-a", "a"), ("a-b", "a-b")]
)
def test_an_answers_id_holds_the_clients(shown: str, own: str) -> None:
    assert bare_id(shown) == own

"""One replica's weights and whether it generates, over an engine whose reloads end when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from deployments.weights.control import Control
from deployments.weights.replica import ReplicaWeights
from deployments.weights.wanted import Weights, WeightsRecord
from renderer.errors import EngineDeadError, EngineError, RequestError
from tests.deployments.weights.test_control import Held

FIRST, SECOND = Weights("/first", "1"), Weights("/second", "2")


class Loading(Held):
    """Reloads take as long as `ready` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str | None] = []
        self.fault: Exception | None = None
        self.asked = asyncio.Event()
        self.ready = asyncio.Event()
        self.ready.set()

    async def reload(self, path: str | None) -> None:
        self.asked.set()
        await self.ready.wait()
        if self.fault is not None:
            raise self.fault
        self.taken.append(path)


class Kept(WeightsRecord):
    """In this process; a read may be held back, with what it has read."""

    def __init__(self) -> None:
        super().__init__(None, "model")
        self.kept = Weights()
        self.reading = asyncio.Event()
        self.answer = asyncio.Event()
        self.answer.set()

    async def read(self) -> Weights:
        kept = self.kept
        self.reading.set()
        await self.answer.wait()
        return kept


class Rig:
    def __init__(self) -> None:
        self.engine, self.record = Loading(), Kept()
        self.control = Control(self.engine)
        self.weights = ReplicaWeights(self.engine, self.control, self.record)

    def generates(self) -> bool:
        return not self.control.is_paused

    async def followed(self) -> None:
        self.weights.follow()
        assert self.weights._following is not None
        await self.weights._following


async def test_what_was_read_before_a_command_does_not_undo_it() -> None:
    rig = Rig()
    rig.control.hold()
    rig.record.answer.clear()
    rig.weights.follow()  # reads that it should generate
    await rig.record.reading.wait()
    await rig.weights.pause("wait")
    rig.record.answer.set()
    await rig.followed()
    assert not rig.generates()


async def test_a_pause_while_weights_are_taken_is_not_undone_when_they_are_there() -> None:
    rig = Rig()
    rig.engine.ready.clear()
    rig.record.kept = FIRST
    rig.weights.follow()
    await rig.engine.asked.wait()
    await rig.weights.pause("wait")
    rig.engine.ready.set()
    await rig.followed()
    assert rig.weights.version == FIRST.version
    assert not rig.generates()


async def test_a_replica_that_starts_takes_what_was_decided_meanwhile() -> None:
    rig = Rig()
    rig.engine.ready.clear()
    rig.record.kept = FIRST
    begun = asyncio.create_task(rig.weights.begin())
    await rig.engine.asked.wait()
    rig.record.kept = Weights(SECOND.path, SECOND.version, paused=True)
    rig.engine.ready.set()
    assert await begun
    assert rig.engine.taken == ["/first", "/second"]
    assert not rig.generates()


@pytest.mark.parametrize("fault", [EngineError("half of them"), EngineDeadError("gone"), RuntimeError("a bug")])
async def test_after_a_failed_reload_nothing_goes_on_before_weights_are_taken_again(fault: Exception) -> None:
    rig = Rig()
    await rig.weights.pause("wait")
    await rig.weights.reload(FIRST)
    rig.engine.fault = fault
    await fails(lambda: rig.weights.reload(SECOND), type(fault))
    await fails(lambda: rig.weights.resume(FIRST), type(fault))
    assert not rig.generates()
    rig.engine.fault = None
    await rig.weights.resume(FIRST)
    assert rig.engine.taken == ["/first", "/first"]
    assert rig.weights.version == FIRST.version
    assert rig.generates()


async def test_weights_that_are_refused_leave_those_before() -> None:
    rig = Rig()
    await rig.weights.pause("wait")
    await rig.weights.reload(FIRST)
    rig.engine.fault = RequestError("of another shape")
    await fails(lambda: rig.weights.reload(SECOND), RequestError)
    await rig.weights.resume(FIRST)
    assert rig.engine.taken == ["/first"]
    assert rig.generates()


async def test_a_replica_that_cannot_follow_says_why_and_is_well_again_once_it_can() -> None:
    rig = Rig()
    rig.record.kept, rig.engine.fault = FIRST, RequestError("no such folder")
    await rig.followed()
    assert not rig.generates()
    with pytest.raises(EngineError, match="no such folder"):
        rig.weights.check()
    rig.engine.fault = None
    await rig.followed()
    rig.weights.check()
    assert rig.generates()


async def fails(work: Callable[[], Awaitable[None]], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        await work()

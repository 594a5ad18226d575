"""Deaths at every place of a stream, without Ray: what the client gets is the undisturbed stream, no token twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from deployments import failover
from deployments.calls import Choice, Delta, Event, GenerateCall, SamplingRequest, Served, Started
from deployments.failover import continued, is_lost, retried
from renderer.conversation import CompletionRequest
from renderer.errors import CacheMissError, EngineDeadError, EngineError, EngineStartingError, RequestError

TOKENS = 6
STARTED = Started(Served("engine", "first"), 10, 4)
DEATHS = [ActorDiedError(), ActorUnavailableError("gone", None), EngineDeadError("the core died"), None]


def call(choices: int = 1) -> GenerateCall:
    numbered = tuple(Choice(index) for index in range(choices))
    return GenerateCall(CompletionRequest(("a",)), SamplingRequest(n=choices), numbered, "id", False)


class Replicas:
    """Replicas that generate `TOKENS` tokens a choice, the first ones dying after so many events.

    Attributes:
        deaths: How many events each of them sends before it dies, first replica first.
        error: What the reader gets then; None for a stream that just ends.
        calls: What each was asked.
    """

    def __init__(self, deaths: list[int], error: Exception | None) -> None:
        self.deaths = deaths
        self.error = error
        self.calls: list[GenerateCall] = []

    async def __call__(self, call: GenerateCall) -> AsyncGenerator[Event]:
        self.calls.append(call)
        left = self.deaths.pop(0) if self.deaths else 10**6
        for event in self._events(call):
            if left == 0:
                if self.error is not None:
                    raise self.error
                return
            left -= 1
            await asyncio.sleep(0)
            yield event

    @staticmethod
    def _events(call: GenerateCall) -> list[Event]:
        replica = "first" if all(not choice.prior_output_ids for choice in call.choices) else "later"
        events: list[Event] = [Started(Served("engine", replica), 10, 4)]
        for position in range(TOKENS):
            for choice in call.choices:
                if position >= len(choice.prior_output_ids):
                    token = 100 * choice.index + position
                    events.append(
                        Delta(choice.index, f"{token} ", (token,), "length" if position == TOKENS - 1 else None)
                    )
        return events


async def read(replicas: Replicas, choices: int = 1, patience_s: float = 5) -> list[Event]:
    return [event async for event in continued(call(choices), replicas, patience_s)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover, "FIRST_PAUSE_S", 0.0005)
    monkeypatch.setattr(failover, "LONGEST_PAUSE_S", 0.001)


@pytest.mark.parametrize("error", DEATHS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("choices", [1, 3])
async def test_a_stream_goes_on_after_a_death_at_any_event(error: Exception | None, choices: int) -> None:
    undisturbed = await read(Replicas([], None), choices)
    for place in range(len(undisturbed)):
        assert sorted(await read(Replicas([place], error), choices), key=str) == sorted(undisturbed, key=str)


async def test_a_try_again_and_a_stream_that_goes_on_are_counted_apart(counted: Counter[str]) -> None:
    await read(Replicas([0], EngineDeadError("died")))
    assert counted == {"retries engine": 1}
    await read(Replicas([1, 1], EngineDeadError("died")))
    assert counted == {"retries engine": 1, "continued_streams": 2}


async def test_what_is_finished_is_not_asked_for_again() -> None:
    replicas = Replicas([1 + 3 * (TOKENS - 1) + 1], EngineDeadError("died"))
    await read(replicas, choices=3)
    assert [choice.index for choice in replicas.calls[1].choices] == [1, 2]
    assert replicas.calls[1].choices[0].prior_output_ids == tuple(range(100, 100 + TOKENS - 1))


async def test_a_death_after_the_last_token_is_none() -> None:
    replicas = Replicas([1 + TOKENS], EngineDeadError("died"))
    assert len(await read(replicas)) == 1 + TOKENS
    assert len(replicas.calls) == 1


async def test_deaths_that_leave_some_progress_each_are_survived() -> None:
    assert len(await read(Replicas([2] * (TOKENS - 1), ActorDiedError()))) == 1 + TOKENS


async def test_a_request_that_every_engine_dies_under_is_given_up() -> None:
    replicas = Replicas([0] * 10, EngineDeadError("died"))
    with pytest.raises(EngineError, match="died under this request") as caught:
        await read(replicas)
    assert caught.value.status == 500
    assert len(replicas.calls) == failover.MAX_DEATHS


async def test_an_engine_that_is_starting_is_waited_for() -> None:
    replicas = Replicas([0] * 10, EngineStartingError("starting"))
    assert len(await read(replicas)) == 1 + TOKENS


async def test_patience_ends() -> None:
    with pytest.raises(EngineDeadError, match="no engine replica"):
        await read(Replicas([0] * 10**6, EngineStartingError("starting")), patience_s=0.02)


@pytest.mark.parametrize("events", [0, 3])
async def test_patience_begins_with_the_loss_however_long_the_replica_was_silent_before(
    events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(failover, "time", SimpleNamespace(monotonic=lambda: now))
    replicas = Replicas([events], EngineDeadError("died"))

    async def silent(call: GenerateCall) -> AsyncGenerator[Event]:
        """Waits in a full engine, or hangs, for much longer than anybody is patient, and dies of it."""
        nonlocal now
        try:
            async for event in replicas(call):
                yield event
        finally:
            now += 3600

    found = [event async for event in continued(call(), silent, patience_s=30)]
    assert sorted(found, key=str) == sorted(await read(Replicas([], None)), key=str)


async def test_a_bad_request_is_not_tried_again() -> None:
    replicas = Replicas([0] * 10, RequestError("bad"))
    with pytest.raises(RequestError):
        await read(replicas)
    assert len(replicas.calls) == 1


async def test_the_replicas_stream_is_closed_when_the_reader_leaves() -> None:
    closed = asyncio.Event()

    async def endless(call: GenerateCall) -> AsyncGenerator[Event]:
        try:
            yield STARTED
            await asyncio.Event().wait()
        finally:
            closed.set()

    stream = continued(call(), endless, 5)
    assert await anext(stream) == STARTED
    await stream.aclose()
    assert closed.is_set()


async def test_pure_work_is_done_again_elsewhere(counted: Counter[str]) -> None:
    tries = iter([ActorDiedError(), ActorUnavailableError("gone", None), None])

    async def work() -> str:
        error = next(tries)
        if error is not None:
            raise error
        return "done"

    assert await retried(work, attempts=3) == "done"
    assert counted == {"retries render": 2}


async def test_pure_work_is_given_up_after_its_attempts_and_never_repeated_for_a_bad_request() -> None:
    tries = []

    async def dying() -> None:
        tries.append("dying")
        raise ActorDiedError

    async def bad() -> None:
        tries.append("bad")
        raise RequestError("bad")

    with pytest.raises(ActorDiedError):
        await retried(dying, attempts=3)
    with pytest.raises(RequestError):
        await retried(bad, attempts=3)
    assert tries == ["dying"] * 3 + ["bad"]


def test_what_counts_as_lost() -> None:
    assert all(is_lost(error) for error in DEATHS if error is not None)
    assert not is_lost(EngineError("this request alone"))
    assert not is_lost(ValueError())


@pytest.mark.parametrize(
    ("error", "ranks"),
    [(EngineStartingError("not up"), [0, 1, 2]), (ActorDiedError(), [0, 0, 0])],
    ids=["alive", "dead"],
)
async def test_a_replica_that_is_alive_without_its_engine_is_passed_over(error: Exception, ranks: list[int]) -> None:
    replicas = Replicas([0, 0], error)
    await read(replicas)
    assert [asked.rank for asked in replicas.calls] == ranks


async def test_an_item_that_comes_by_its_name_alone_is_asked_of_every_replica() -> None:
    replicas = Replicas([0, 0], CacheMissError("nothing is held", "image_url"))
    events = [event async for event in continued(call(), replicas, 1, replicas=3)]
    assert len(events) == 1 + TOKENS
    assert [asked.rank for asked in replicas.calls] == [0, 1, 2]


async def test_an_item_that_no_replica_knows_is_the_callers_to_send() -> None:
    for number in (1, 3):
        replicas = Replicas([0] * 9, CacheMissError("nothing is held", "image_url"))
        with pytest.raises(CacheMissError):
            _ = [event async for event in continued(call(), replicas, 1, replicas=number)]
        assert len(replicas.calls) == number

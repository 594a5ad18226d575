"""What is let in. Too little is an outage by our own hand, too much an overload that nobody answers for."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from deployments.admission import Admission, Lane, Limit, Share, Ticket, UnderWay
from renderer.errors import OverloadedError

MIB = 2**20
LIMITS = {
    Lane.RENDER: Limit(4, 8 * MIB),
    Lane.GENERATION: Limit(6, 16 * MIB),
    Lane.OVERFLOW: Limit(3, 12 * MIB),
}


def holding(**numbers: int) -> tuple[Admission, list[Ticket]]:
    """An admission with so many requests of 1 MiB in its lanes."""
    admission = Admission(LIMITS)
    lanes = [Lane(name) for name, number in numbers.items() for _ in range(number)]
    return admission, [admission.admit(lane, media_bytes=MIB) for lane in lanes]


CASES = [
    # under way (1 MiB each), lanes asked for, MiB -> the lane that takes it
    ({}, (Lane.RENDER,), 0, Lane.RENDER),
    ({"render": 3}, (Lane.RENDER,), 5, Lane.RENDER),
    ({"render": 3}, (Lane.RENDER,), 6, None),  # bytes
    ({"render": 4}, (Lane.RENDER,), 0, None),  # requests
    ({}, (Lane.RENDER,), 9, Lane.RENDER),  # alone, or it would never be served
    ({"render": 1}, (Lane.RENDER,), 9, None),
    ({"render": 4}, (Lane.GENERATION,), 1, Lane.GENERATION),  # a render flood does not starve generation
    ({"generation": 6}, (Lane.RENDER,), 1, Lane.RENDER),
    ({"render": 4}, (Lane.RENDER, Lane.OVERFLOW), 1, Lane.OVERFLOW),
    ({"render": 3}, (Lane.RENDER, Lane.OVERFLOW), 1, Lane.RENDER),
    ({"render": 4, "generation": 2}, (Lane.RENDER, Lane.OVERFLOW), 1, Lane.OVERFLOW),
    ({"render": 4, "generation": 3}, (Lane.RENDER, Lane.OVERFLOW), 1, None),  # never ahead of generation
    ({"render": 4, "overflow": 3}, (Lane.GENERATION,), 1, Lane.GENERATION),
    ({"generation": 6}, (Lane.GENERATION,), 0, None),
    ({"generation": 2}, (Lane.OVERFLOW,), 10, Lane.OVERFLOW),
    ({"generation": 2}, (Lane.OVERFLOW,), 11, None),
]


@pytest.mark.parametrize(("under_way", "lanes", "mib", "expected"), CASES)
def test_a_request_gets_the_first_lane_with_room(
    under_way: dict[str, int], lanes: tuple[Lane, ...], mib: int, expected: Lane | None
) -> None:
    admission, _held = holding(**under_way)
    if expected is None:
        with pytest.raises(OverloadedError):
            admission.admit(*lanes, media_bytes=mib * MIB)
    else:
        assert admission.admit(*lanes, media_bytes=mib * MIB).lane is expected


@pytest.mark.parametrize("routers", [1, 2, 3, 7])
@pytest.mark.parametrize("whole", [Limit(64, 512 * MIB), Limit(7, 10), Limit(100, 1), Limit(0, 0), Limit(9, 7)])
def test_the_shares_of_a_limit_add_up_to_it_and_differ_by_one_at_most(whole: Limit, routers: int) -> None:
    shares = [whole.share(Share(place, routers)) for place in range(routers)]
    for total, parts in (
        (whole.requests, [share.requests for share in shares]),
        (whole.media_bytes, [share.media_bytes for share in shares]),
    ):
        assert sum(parts) == (total if total >= routers or total == 0 else routers)
        assert max(parts) - min(parts) <= 1


def test_a_refusal_says_which_limit_was_met_and_when_to_come_back() -> None:
    admission = Admission({Lane.RENDER: Limit(1, MIB)}, retry_after_s=7)
    with admission.admit(Lane.RENDER), pytest.raises(OverloadedError, match="render: 1 requests are under way") as met:
        admission.admit(Lane.RENDER)
    assert (met.value.status, met.value.retry_after_s) == (503, 7)


def test_a_ticket_is_given_back_once_whatever_ends_the_request() -> None:
    admission = Admission(LIMITS)
    with admission.admit(Lane.RENDER, media_bytes=5) as ticket:
        assert admission.under_way(Lane.RENDER) == UnderWay(1, 5)
    ticket.release()
    with pytest.raises(RuntimeError), admission.admit(Lane.RENDER):
        raise RuntimeError
    assert admission.under_way(Lane.RENDER) == UnderWay()


def test_a_request_is_resized_once_it_is_known_what_it_carries() -> None:
    admission = Admission(LIMITS)
    with admission.admit(Lane.RENDER, media_bytes=7 * MIB) as ticket, admission.admit(Lane.RENDER) as other:
        ticket.resize(5 * MIB)
        other.resize(3 * MIB)
        with pytest.raises(OverloadedError):
            other.resize(3 * MIB + 1)
        assert admission.under_way(Lane.RENDER) == UnderWay(2, 8 * MIB)
    assert admission.under_way(Lane.RENDER) == UnderWay()


def test_a_smaller_size_is_taken_even_where_the_limit_has_shrunk_below_it() -> None:
    admission = Admission(LIMITS)
    with admission.admit(Lane.RENDER, media_bytes=5 * MIB) as ticket, admission.admit(Lane.RENDER):
        admission.set_limit(Lane.RENDER, Limit(1, MIB))
        ticket.resize(4 * MIB)
        assert admission.under_way(Lane.RENDER) == UnderWay(2, 4 * MIB)


async def _answer(ticket: Ticket) -> AsyncGenerator[int]:
    with ticket:
        for number in range(3):
            yield number


async def test_a_stream_keeps_its_ticket_to_its_end() -> None:
    admission = Admission(LIMITS)
    with admission.admit(Lane.GENERATION) as ticket:
        stream = _answer(ticket.pass_on())
    del ticket
    assert [number async for number in stream] == [0, 1, 2]
    assert admission.under_way(Lane.GENERATION) == UnderWay()


@pytest.mark.parametrize("read", [0, 1])
async def test_a_stream_that_is_abandoned_gives_its_ticket_back(read: int) -> None:
    admission = Admission(LIMITS)
    with admission.admit(Lane.GENERATION) as ticket:
        stream = _answer(ticket.pass_on())
    del ticket
    for _ in range(read):
        await anext(stream)
    assert admission.under_way(Lane.GENERATION) == UnderWay(1, 0)
    await stream.aclose()
    del stream
    gc.collect()
    assert admission.under_way(Lane.GENERATION) == UnderWay()


def test_an_error_ends_a_ticket_that_was_to_be_passed_on() -> None:
    admission = Admission(LIMITS)
    other = admission.admit(Lane.GENERATION)
    with pytest.raises(OverloadedError), admission.admit(Lane.GENERATION, media_bytes=MIB) as ticket:
        ticket.pass_on().resize(17 * MIB)
    other.release()
    assert admission.under_way(Lane.GENERATION) == UnderWay()


@pytest.mark.parametrize(("limit", "number"), [(1, 2), (15, 30), (50, 1000)])
async def test_a_burst_is_admitted_exactly_up_to_the_limit_and_the_rest_refused_at_once(
    limit: int, number: int
) -> None:
    """Ray Serve's own limit rejects 10 of 14 at 2 + 3."""
    admission = Admission({Lane.RENDER: Limit(limit, MIB)})
    leave = asyncio.Event()

    async def request() -> bool:
        with admission.admit(Lane.RENDER):
            await leave.wait()
            return True

    requests = [asyncio.create_task(request()) for _ in range(number)]
    refused, waiting = await asyncio.wait(requests, return_when=asyncio.FIRST_EXCEPTION)
    while len(refused) < number - limit:
        refused, waiting = await asyncio.wait(requests, timeout=0)
    assert (len(waiting), admission.under_way(Lane.RENDER).requests) == (limit, limit)
    assert all(isinstance(request.exception(), OverloadedError) for request in refused)
    leave.set()
    assert await asyncio.gather(*waiting) == [True] * limit
    assert admission.under_way(Lane.RENDER) == UnderWay()


async def test_a_cancelled_request_gives_its_place_to_the_next() -> None:
    admission = Admission({Lane.RENDER: Limit(1, MIB)})

    async def request() -> None:
        with admission.admit(Lane.RENDER):
            await asyncio.Event().wait()

    first = asyncio.create_task(request())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    admission.admit(Lane.RENDER).release()


@given(st.integers(0, 5), st.integers(0, 5))
def test_the_limit_of_several_replicas_is_their_sum(requests: int, replicas: int) -> None:
    assert Limit(requests, 10 * requests).times(replicas) == Limit(requests * replicas, 10 * requests * replicas)


class AdmissionMachine(RuleBasedStateMachine):
    """Whatever comes and goes in whatever order: what is counted is what is held, and no limit is passed."""

    tickets: Bundle[tuple[Ticket, int]] = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(LIMITS)
        self.held: dict[int, tuple[Lane, int]] = {}

    @rule(target=tickets, lane=st.sampled_from(list(Lane)), size=st.integers(0, 6 * MIB))
    def admit(self, lane: Lane, size: int) -> tuple[Ticket, int]:
        used = self._used(lane)
        fits = used[0] < LIMITS[lane].requests and (
            size == 0 or used[1] + size <= LIMITS[lane].media_bytes or used[0] == 0
        )
        try:
            ticket = self.admission.admit(lane, media_bytes=size)
        except OverloadedError:
            assert not fits
            return Admission({Lane.RENDER: Limit(1, 0)}).admit(Lane.RENDER), -1
        assert fits
        self.held[id(ticket)] = (lane, size)
        return ticket, size

    @rule(ticket=consumes(tickets))
    def release(self, ticket: tuple[Ticket, int]) -> None:
        ticket[0].release()
        self.held.pop(id(ticket[0]), None)

    @invariant()
    def what_is_counted_is_held(self) -> None:
        for lane in Lane:
            own = self._own(lane)
            assert self.admission.under_way(lane) == UnderWay(len(own), sum(own))

    def _own(self, lane: Lane) -> list[int]:
        return [size for held, size in self.held.values() if held is lane]

    def _used(self, lane: Lane) -> tuple[int, int]:
        own = self._own(lane)
        if lane is Lane.OVERFLOW:
            own = own + self._own(Lane.GENERATION)
        return len(own), sum(own)


test_nothing_is_lost_or_counted_twice = AdmissionMachine.TestCase

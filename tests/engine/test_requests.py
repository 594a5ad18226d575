"""An abort ends the step that a request is in, and every later one before it begins."""

from __future__ import annotations

import asyncio

import pytest

from engine.requests import Aborted, Requests, UnderWay


async def wait(request: UnderWay, ended: asyncio.Event) -> None:
    async with request.step():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()


async def begun(request: UnderWay, ended: asyncio.Event) -> asyncio.Task[None]:
    waiting = asyncio.create_task(wait(request, ended))
    await asyncio.sleep(0)
    return waiting


async def test_an_abort_ends_the_step_that_a_request_waits_in_and_keeps_it_out_of_the_next() -> None:
    requests, ended = Requests(), asyncio.Event()
    with requests.under_way("mine") as mine, requests.under_way("other") as other:
        waiting = await begun(mine, ended)
        assert requests.abort("mine")
        assert requests.abort("mine"), "as clients do"
        with pytest.raises(Aborted):
            await waiting
        assert (mine.is_aborted, other.is_aborted, ended.is_set()) == (True, False, True)
        with pytest.raises(Aborted):
            await wait(mine, ended)


async def test_an_abort_between_steps_ends_the_request_at_the_next() -> None:
    requests = Requests()
    with requests.under_way("mine") as mine:
        async with mine.step():
            pass
        requests.abort("mine")
        with pytest.raises(Aborted):
            await wait(mine, asyncio.Event())


async def test_an_error_of_a_step_is_its_own() -> None:
    with Requests().under_way("mine") as mine, pytest.raises(TimeoutError, match="of another kind"):
        async with mine.step():
            raise TimeoutError("of another kind")


async def test_who_leaves_is_not_taken_for_an_abort() -> None:
    ended = asyncio.Event()
    with Requests().under_way("mine") as mine:
        waiting = await begun(mine, ended)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (mine.is_aborted, ended.is_set()) == (False, True)


async def test_requests_of_one_id_are_aborted_together_and_nothing_is_kept() -> None:
    requests = Requests()
    with requests.under_way("same") as first, requests.under_way("same") as second:
        assert requests.abort("same")
        assert (first.is_aborted, second.is_aborted) == (True, True)
    assert not requests.abort("same")
    assert not requests.abort("unknown")
    assert not requests._by_id

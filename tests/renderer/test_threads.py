"""A pool's every thread can be reached, and an abandoned job's result is not lost."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextvars import ContextVar

import pytest

from renderer.threads import WarmPool

DEADLINE_S = 20


@pytest.fixture
def pool() -> Iterator[WarmPool]:
    pool = WarmPool(3, "test")
    yield pool
    pool.close()


def test_each_runs_once_in_every_thread(pool: WarmPool) -> None:
    assert len(set(pool.each(threading.get_ident))) == 3


def test_each_runs_in_one_thread_after_the_other(pool: WarmPool) -> None:
    inside = threading.Semaphore(1)

    def alone() -> bool:
        free = inside.acquire(blocking=False)
        threading.Event().wait(0.01)
        inside.release()
        return free

    assert pool.each(alone) == [True, True, True]


def test_each_from_two_callers_at_once_ends(pool: WarmPool) -> None:
    callers = [threading.Thread(target=pool.each, args=(threading.get_ident,)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(DEADLINE_S)
    assert not any(caller.is_alive() for caller in callers)


def test_each_gives_every_thread_its_turn_and_raises_what_one_raised(pool: WarmPool) -> None:
    turns: list[int] = []

    def fail_first() -> None:
        turns.append(threading.get_ident())
        if len(turns) == 1:
            raise KeyError("first")

    with pytest.raises(KeyError):
        pool.each(fail_first)
    assert len(turns) == 3


async def test_run_gives_the_result(pool: WarmPool) -> None:
    assert await pool.run(divmod, 17, 5) == (3, 2)


async def test_run_raises_what_the_job_raises(pool: WarmPool) -> None:
    with pytest.raises(ZeroDivisionError):
        await pool.run(divmod, 1, 0)


async def test_a_cancelled_task_hands_the_late_result_to_discard(pool: WarmPool) -> None:
    started, go, discarded = threading.Event(), threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    results: list[str] = []

    def job() -> str:
        started.set()
        go.wait(DEADLINE_S)
        return "late"

    def discard(result: str) -> None:
        results.append(result)
        loop.call_soon_threadsafe(discarded.set)

    task = asyncio.create_task(pool.run(job, discard=discard))
    await asyncio.to_thread(started.wait, DEADLINE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert results == []
    go.set()
    await asyncio.wait_for(discarded.wait(), DEADLINE_S)
    assert results == ["late"]


async def test_a_result_that_is_there_when_the_task_is_cancelled_is_discarded_too(pool: WarmPool) -> None:
    results: list[int] = []
    task = asyncio.create_task(pool.run(int, "7", discard=results.append))
    await asyncio.sleep(0)
    # The job ends while the loop is held, so its result and the cancellation meet in the same step.
    assert pool.submit(int, "1").result(DEADLINE_S) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    pool.each(threading.get_ident)
    assert results == [7]


async def test_a_cancelled_task_takes_a_job_that_waits_out_of_the_queue(pool: WarmPool) -> None:
    go = threading.Event()
    ran: list[int] = []
    blockers = [pool.submit(go.wait, DEADLINE_S) for _ in range(3)]
    task = asyncio.create_task(pool.run(ran.append, 1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    assert all(blocker.result(DEADLINE_S) for blocker in blockers)
    pool.each(threading.get_ident)
    assert ran == []


def test_closing_drops_the_jobs_that_wait() -> None:
    pool = WarmPool(1, "test")
    started, go = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        go.wait(DEADLINE_S)

    running = pool.submit(hold)
    assert started.wait(DEADLINE_S)
    waiting = pool.submit(int)
    closer = threading.Thread(target=pool.close)
    closer.start()
    with pytest.raises(CancelledError):
        waiting.result(DEADLINE_S)
    go.set()
    closer.join(DEADLINE_S)
    assert running.done()


async def test_a_job_sees_the_context_variables_of_its_submitter() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")
    inner, outer = WarmPool(1, "inner"), WarmPool(1, "outer")
    variable.set("set")
    assert await outer.run(lambda: inner.submit(variable.get).result(DEADLINE_S)) == "set"
    variable.set("changed")
    assert await outer.run(variable.get) == "changed"
    outer.close()
    inner.close()


def test_jobs_that_go_first_run_before_all_others_that_wait() -> None:
    pool, go = WarmPool(1, "test"), threading.Event()
    order: list[int] = []
    holding = pool.submit(go.wait, DEADLINE_S)
    jobs = [pool.submit(order.append, number, first=number in (2, 4)) for number in range(6)]
    dropped = pool.submit(order.append, 6, first=True)
    assert dropped.cancel()
    go.set()
    assert holding.result(DEADLINE_S)
    for job in jobs:
        job.result(DEADLINE_S)
    assert order == [2, 4, 0, 1, 3, 5]
    pool.close()


def test_a_closed_pool_takes_no_job() -> None:
    pool = WarmPool(1, "test")
    pool.close()
    with pytest.raises(RuntimeError):
        pool.submit(int)

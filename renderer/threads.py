"""Thread pools whose every thread can be warmed, and the one bridge from an event loop to them."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")

# A thread that never comes (the pool is being closed) must not hold the others for ever.
_GATHERING_TIMEOUT_S = 600.0
_running = threading.local()


def abandoned() -> bool:
    """Whether the job that runs in this thread is awaited by nobody any more."""
    left: threading.Event | None = getattr(_running, "left", None)
    return left is not None and left.is_set()


class WarmPool:
    """`size` threads that take jobs in the order of submission, those that go first before the others.

    A job sees the context variables of its submitter.
    A job may wait for jobs of another pool, never for one of its own: all threads could come to wait so.
    """

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self._executor = ThreadPoolExecutor(size, thread_name_prefix=name)
        self._each_lock = threading.Lock()
        self._first: deque[_Job] = deque()
        self._others: deque[_Job] = deque()

    def submit(self, fn: Callable[..., Result], *args: Any, first: bool = False) -> Future[Result]:
        """Run `fn(*args)` in a thread.

        Args:
            first: Before all jobs that wait and do not go first.

        Raises:
            RuntimeError: The pool is closed.
        """
        job, queue = _Job(partial(copy_context().run, fn, *args)), self._first if first else self._others
        queue.append(job)
        try:
            self._executor.submit(self._take)
        except RuntimeError:
            queue.remove(job)
            raise
        return job.future

    def _take(self) -> None:
        """Run the next job. It is called once for each, in whatever order they were submitted."""
        for queue in (self._first, self._others):
            try:
                job = queue.popleft()
            except IndexError:
                continue
            job.run()
            return

    def each(self, fn: Callable[[], Result]) -> list[Result]:
        """Run `fn` once in every thread, one thread after the other; return the results.

        Raises:
            Exception: The first one that `fn` raised, after every thread has had its turn.
        """
        with self._each_lock:
            gathered = threading.Barrier(self.size)
            turn = threading.Lock()

            def take_turn() -> Result:
                gathered.wait(_GATHERING_TIMEOUT_S)
                with turn:
                    return fn()

            futures = [self._executor.submit(take_turn) for _ in range(self.size)]
            errors = [future.exception() for future in futures]
            for error in errors:
                if error is not None:
                    raise error
            return [future.result() for future in futures]

    async def run(
        self,
        fn: Callable[..., Result],
        *args: Any,
        first: bool = False,
        discard: Callable[[Result], object] | None = None,
    ) -> Result:
        """Run `fn(*args)` in a thread and await its result.

        Cancelling the awaiting task takes a job that waits for a thread out of the queue; one that runs can ask whether
        it is `abandoned`, and `discard` gets the result that nobody awaits any more, in the thread that made it.
        """
        left = threading.Event()
        future = self.submit(_run, left, fn, args, first=first)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            left.set()
            if not future.cancel() and discard is not None:
                future.add_done_callback(lambda done: _hand_over(done, discard))
            raise

    def close(self) -> None:
        """Drop the jobs that wait, let the running ones end, take no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for job in (*self._first, *self._others):
            job.future.cancel()
        self._executor.shutdown(wait=True)


class _Job:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except BaseException as error:
            self.future.set_exception(error)


def _run(left: threading.Event, fn: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    _running.left = left
    try:
        return fn(*args)
    finally:
        del _running.left


def _hand_over(done: Future[Result], discard: Callable[[Result], object]) -> None:
    if not done.cancelled() and done.exception() is None:
        discard(done.result())

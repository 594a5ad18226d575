"""Thread pools whose every thread can be warmed, and the one bridge from an event loop to them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
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
    """`size` threads that take jobs in the order of submission; a job sees the context variables of its submitter.

    A job may wait for jobs of another pool, never for one of its own: all threads could come to wait so.
    """

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self._executor = ThreadPoolExecutor(size, thread_name_prefix=name)
        self._each_lock = threading.Lock()

    def submit(self, fn: Callable[..., Result], *args: Any) -> Future[Result]:
        return self._executor.submit(copy_context().run, fn, *args)

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
        self, fn: Callable[..., Result], *args: Any, discard: Callable[[Result], object] | None = None
    ) -> Result:
        """Run `fn(*args)` in a thread and await its result.

        Cancelling the awaiting task takes a job that waits for a thread out of the queue; one that runs can ask whether
        it is `abandoned`, and `discard` gets the result that nobody awaits any more, in the thread that made it.
        """
        left = threading.Event()
        future = self._executor.submit(copy_context().run, _run, left, fn, args)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            left.set()
            if not future.cancel() and discard is not None:
                future.add_done_callback(lambda done: _hand_over(done, discard))
            raise

    def close(self) -> None:
        """Drop the jobs that wait, let the running ones end, take no more."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _run(left: threading.Event, fn: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    _running.left = left
    try:
        return fn(*args)
    finally:
        del _running.left


def _hand_over(done: Future[Result], discard: Callable[[Result], object]) -> None:
    if not done.cancelled() and done.exception() is None:
        discard(done.result())

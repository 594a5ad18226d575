"""The embedded engine: the replica's side of a core process, which it starts, feeds, watches and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.messages import Abort, Call, FromCore, Outputs, Ready, Reply, StartFailed, Submit, ToCore
from engine.process import CoreProcess
from engine.protocol import EngineOutput, EngineStats, SamplingParams
from engine.stream import Stream
from renderer.caches import SenderCache
from renderer.errors import EngineDeadError, EngineStartingError, GreenroomError, RequestError
from renderer.prompt import RenderedPrompt

logger = logging.getLogger("greenroom.engine")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


class EmbeddedEngine:
    """An engine whose core is a process beside this one, with the sender cache that it shares with the renderer.

    One thread keeps the core: it starts it, takes what it sends, and starts another when it dies. Streams belong to the
    event loops that asked for them. Everything that the core is told goes out in one order, in which the sender cache
    was told it too: one lock is around both.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.sender_cache = SenderCache(config.mm_cache_bytes)
        self._order = threading.Lock()
        self._core: CoreProcess | None = None
        self._serving = False
        self._closed = threading.Event()
        self._started: Future[None] = Future()
        self._keys = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._calls: dict[int, Future[EngineStats]] = {}
        self._loading: set[int] = set()  # calls that may take as long as they take
        self._last_stats = EngineStats()
        self._ready: Ready | None = None
        self._restarts = 0
        self._keeper = threading.Thread(target=self._keep, name="greenroom-engine", daemon=True)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together that the engine can hold for one request.

        Raises:
            EngineStartingError: It has not started.
        """
        if self._ready is None:
            raise EngineStartingError("the engine core is not up")
        return self._ready.max_model_len

    async def start(self) -> None:
        """Start the core and wait until it is warm.

        Raises:
            ConfigError: The checkpoint or the configuration cannot be served.
            EngineError: The core ended while it started.
        """
        self._keeper.start()
        await asyncio.wrap_future(self._started)

    async def generate(
        self, prompt: RenderedPrompt, params: SamplingParams, *, request_id: str, prior_output_ids: Sequence[int] = ()
    ) -> AsyncIterator[EngineOutput]:
        """See `engine.protocol.Engine`. The request is submitted when the first output is asked for."""
        try:
            key, stream = self._submit(prompt, params, request_id, prior_output_ids)
            try:
                while not stream.ended:
                    yield await stream.next()
            finally:
                self._forget(key, stream)
        finally:
            if prompt.lease is not None:
                prompt.lease.close()

    async def abort(self, request_id: str) -> None:
        with self._order:
            keys = tuple(key for key, stream in self._streams.items() if stream.request_id == request_id)
            if keys:
                self._tell(Abort(keys, silent=False))

    async def health(self) -> None:
        self._check_serving()

    async def stats(self) -> EngineStats:
        """The core's counters after everything that it was told before; the last known ones while there is no core.

        A core answers between two steps. One that does not for `stall_s` hangs, whatever on: it is ended as if it had
        died, so that its requests go on elsewhere.
        """
        core = self._core
        try:
            async with asyncio.timeout(self.config.stall_s):
                self._last_stats = await self._call("stats")
        except EngineDeadError:
            pass
        except TimeoutError:
            self._end_stalled(core)
        warmup_s = {} if self._ready is None else self._ready.warmup_s
        return replace(self._last_stats, restarts=self._restarts, warmup_s=warmup_s)

    async def reset_cache(self) -> None:
        """Empty all caches. An item that a request has pinned goes when it is unpinned."""
        await self._call("reset_cache")

    async def reload(self, path: str | None) -> None:
        """See `engine.protocol.Engine`. A core that starts later has these weights too."""

        def keep(reloaded: Future[EngineStats]) -> None:
            """Runs in the keeper's thread, before it could start another core."""
            if reloaded.exception() is None:
                self.config = self.config.model_copy(update={"weights": path})

        await self._call("reload", path, keep)

    async def close(self) -> None:
        """End the core; streams that still run end with EngineDeadError."""
        self._closed.set()
        core = self._core
        if core is not None:
            core.close()
        if self._keeper.is_alive():
            await asyncio.to_thread(self._keeper.join)

    def _submit(
        self, prompt: RenderedPrompt, params: SamplingParams, request_id: str, prior_output_ids: Sequence[int]
    ) -> tuple[int, Stream]:
        """Commit the items and send the request, in one step."""
        token_ids, prior = _ids(prompt.token_ids), _ids(prior_output_ids)
        ranges = tuple(item.range for item in prompt.items)
        with self._order:
            self._check_serving()
            submission = self.sender_cache.commit(prompt.items)
            key = next(self._keys)
            stream = self._streams[key] = Stream(request_id, asyncio.get_running_loop())
            self._tell(Submit(key, token_ids, ranges, submission, params, prior, prompt.cache_salt))
        return key, stream

    def _forget(self, key: int, stream: Stream) -> None:
        """Let go of a stream; the core is told where it still works for it. Comes before the items are unpinned."""
        with self._order:
            known = self._streams.pop(key, None) is not None
            if known and not stream.ended and self._serving:
                self._tell(Abort((key,), silent=True))

    async def _call(
        self,
        operation: Literal["stats", "reset_cache", "reload"],
        weights: str | None = None,
        done: Callable[[Future[EngineStats]], None] | None = None,
    ) -> EngineStats:
        future: Future[EngineStats] = Future()
        future.set_running_or_notify_cancel()  # who no longer waits cannot cancel what the core answers all the same
        if done is not None:
            future.add_done_callback(done)
        with self._order:
            self._check_serving()
            number = next(self._keys)
            self._calls[number] = future
            if operation == "reload":
                self._loading.add(number)
            drop: tuple[str, ...] = ()
            if operation == "reset_cache":
                self.sender_cache.clear_cache()
                drop = self.sender_cache.commit(()).drop
            self._tell(Call(number, operation, drop, weights))
        return await asyncio.wrap_future(future)

    def _end_stalled(self, core: CoreProcess | None) -> None:
        if core is not None and not self._loading:
            logger.error("the engine core has answered nothing for %.0f s; it ends for it", self.config.stall_s)
            core.kill()

    def _tell(self, message: ToCore) -> None:
        if self._core is not None:
            self._core.send(message)

    def _check_serving(self) -> None:
        if not self._serving:
            raise EngineStartingError("the engine core is not up")

    def _keep(self) -> None:
        """The keeper's thread: one core after another, until the engine is closed or the first one cannot start."""
        pause_s = _FIRST_PAUSE_S
        while not self._closed.is_set():
            served = self._run_core()
            if self._ready is None:
                return
            pause_s = _FIRST_PAUSE_S if served else min(2 * pause_s, _LONGEST_PAUSE_S)
            self._closed.wait(0 if served else pause_s)

    def _run_core(self) -> bool:
        """Start a core and take what it sends until it is gone; return whether it ever served."""
        try:
            core = CoreProcess(self.config)
        except Exception as error:
            self._mourn(f"the engine core cannot be started: {error}")
            return False
        self._core = core
        if self._closed.is_set():
            core.close()
        served = False
        try:
            while True:
                message = core.receive()
                served = served or isinstance(message, Ready)
                self._take(message)
        except EOFError:
            pass
        except Exception:
            logger.exception("what the engine core sends cannot be taken; the core ends for it")
        self._mourn(f"the engine core ended with code {core.reap()}")
        return served

    def _take(self, message: FromCore) -> None:
        match message:
            case Outputs():
                self._deliver(message)
            case Reply():
                future = self._calls.pop(message.number)
                self._loading.discard(message.number)
                if message.error is None:
                    future.set_result(message.stats)
                else:
                    future.set_exception(message.error)
            case Ready():
                with self._order:
                    self._restarts += self._ready is not None
                    self._ready, self._serving = message, True
                if not self._started.done():
                    self._started.set_result(None)
            case StartFailed():
                logger.error("the engine core cannot start: %s", message.error)
                if not self._started.done():
                    self._started.set_exception(message.error)

    def _deliver(self, message: Outputs) -> None:
        """Hand outputs to their streams, one call a step into each event loop."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[Stream, EngineOutput | GreenroomError]]] = defaultdict(list)
        everything: tuple[tuple[int, EngineOutput | GreenroomError], ...] = (*message.outputs, *message.failures)
        for key, output in everything:
            stream = self._streams.get(key)
            if stream is not None:
                news[stream.loop].append((stream, output))
        for loop, batch in news.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its streams with it
                loop.call_soon_threadsafe(_push_all, batch)

    def _mourn(self, reason: str) -> None:
        """The core is gone: everything that it held is, too. Runs before anybody can submit to another one."""
        error = EngineDeadError(reason)
        with self._order:
            self._serving = False
            self.sender_cache.reset()
            failures = tuple((key, error) for key in self._streams)
            calls, self._calls = self._calls, {}
            self._loading.clear()
        if not self._closed.is_set():
            logger.error("%s; %d requests end with it", reason, len(failures))
        self._deliver(Outputs((), failures))
        for future in calls.values():
            future.set_exception(error)
        if not self._started.done():
            self._started.set_exception(error)


def _push_all(batch: Sequence[tuple[Stream, EngineOutput | GreenroomError]]) -> None:
    for stream, output in batch:
        stream.push(output)


def _ids(token_ids: Sequence[int]) -> NDArray[np.int32]:
    """int32 [tokens].

    Raises:
        RequestError: One is too large for any vocabulary; the core checks against its own.
    """
    try:
        return np.array(token_ids, dtype=np.int32)
    except OverflowError as error:
        raise RequestError("a token of the prompt is outside the vocabulary", "prompt") from error

"""What a replica writes down about itself: when it was warm, when its first request came, what came since."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from deployments.calls import ReplicaReport, TierName
from deployments.error_response import status_of
from deployments.metrics import metrics, sample, silence
from engine.protocol import EngineStats
from renderer.caches import CacheStats

logger = logging.getLogger("ray.serve.greenroom")


class Record:
    """One replica's record. Used from the replica's event loop alone."""

    def __init__(self, tier: TierName) -> None:
        attach_loggers()
        self.tier = tier
        self.replica = replica_id()
        self._started_at = time.time()
        self._warmup_ended_at: float | None = None
        self._warmup_s: dict[str, float] = {}
        self._first_request_at: float | None = None
        self._first_request_s: float | None = None
        self._measuring = False
        self._requests: Counter[str] = Counter()
        self._telling: asyncio.Task[None] | None = None
        self._unrecorded = False

    def add_steps(self, steps: Mapping[str, float]) -> None:
        """Seconds of warm-up steps, in the order in which they ran."""
        self._warmup_s |= steps

    def warm(self) -> None:
        """Warm-up has ended; the replica may become reachable."""
        self._warmup_ended_at = time.time()
        steps = ", ".join(f"{name} {seconds:.3f}s" for name, seconds in self._warmup_s.items())
        logger.info("%s replica %s is warm: %s", self.tier, self.replica, steps)

    @contextmanager
    def request(self, operation: str) -> Iterator[None]:
        """Around the work for one request, whose outcome is counted."""
        if self._unrecorded:
            yield
            return
        self._requests[operation] += 1
        status = 200
        try:
            if self._first_request_s is not None or self._measuring:
                yield
            else:
                with self._first_request():
                    yield
        except BaseException as error:
            status = status_of(error)
            raise
        finally:
            metrics().requests.inc(tags={"tier": self.tier, "operation": operation, "status": str(status)})

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Requests meanwhile are the replica's own: nothing of them is counted."""
        self._unrecorded = True
        try:
            with silence():
                yield
        finally:
            self._unrecorded = False

    @contextmanager
    def _first_request(self) -> Iterator[None]:
        """One that fails says nothing about a replica's warmth; the next is measured in its place."""
        self._first_request_at = self._first_request_at or time.time()
        self._measuring, begun = True, time.perf_counter()
        try:
            yield
            self._first_request_s = time.perf_counter() - begun
        finally:
            self._measuring = False

    def tell(self, report: Callable[[], Awaitable[ReplicaReport]]) -> None:
        """Make metrics of the replica's totals and levels from now on."""
        self._telling = asyncio.create_task(sample(report))

    def report(
        self,
        max_model_len: int | None = None,
        caches: Mapping[str, CacheStats] | None = None,
        engine: EngineStats | None = None,
        under_way: Mapping[str, float] | None = None,
        items: Mapping[str, int] | None = None,
    ) -> ReplicaReport:
        return ReplicaReport(
            tier=self.tier,
            replica=self.replica,
            pid=os.getpid(),
            node=node_id(),
            started_at=self._started_at,
            warmup_ended_at=self._warmup_ended_at,
            warmup_s=self._warmup_s,
            first_request_at=self._first_request_at,
            first_request_s=self._first_request_s,
            requests=dict(self._requests),
            max_model_len=max_model_len,
            caches=caches or {},
            engine=engine,
            under_way=under_way or {},
            items=dict(items or {}),
        )


def replica_id() -> str:
    """This replica's unique id; `local` outside of Ray Serve."""
    try:
        return str(serve.get_replica_context().replica_tag)
    except RayServeException:
        return "local"


def application() -> str | None:
    """The name of this replica's application; None outside of Ray Serve."""
    try:
        return str(serve.get_replica_context().app_name)
    except RayServeException:
        return None


def node_id() -> str:
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else "local"


def attach_loggers() -> None:
    """Let what the renderer and the engine log reach Serve's log files, which take children of `ray.serve` only."""
    logging.getLogger("greenroom").parent = logger

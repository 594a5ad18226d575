"""The request router of the engine tier: `affinity.place` inside Ray Serve.

Set as `request_router_config` of a deployment, it runs in every process that holds a handle to it, each with a view
of its own. Serve pickles this module by value, so it stays small and imports little.

A call says what it is known by in one of two ways: the attribute `affinity` of its first argument, which costs
nothing, or the handle's `session_id`. A call with neither goes to any replica that is not ahead of the others. The
attribute `rank` of the first argument is the place in the rank to begin at: a caller that was sent away by a replica
that is alive tries the next one so.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.util import metrics

from deployments.affinity import EVEN, Load, LoadBound, place, rank

# A replica's queue length is asked for no more often than this: under overload every request would ask.
PROBE_PERIOD_S = 0.25
# Doublings of Serve's deadline for the answer, 0.1 s: nobody waits for these answers.
PROBE_PATIENCE = 4
# For how long a replica that could not be reached is passed over.
SHUN_S = 1.0
FULL = Load(1, 1)


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Places every call by itself, at once, in the caller's own coroutine.

    The base class indexes waiting calls by a request id that all calls made for one HTTP request share, and would
    serve one of them and leave the others waiting for ever. So its queue is not used: `_choose_replica_for_request`
    is overridden, as Ray's own capacity queue router does.

    A replica's load is the larger of two figures: the requests under way that this process has sent it, exact but
    blind to other processes, and the queue length that the replica last told, corrected by what was sent since.
    """

    def initialize_state(self, factor: float = 1.5, idle: int = 8, busy: int = 32, reserved: int = 0) -> None:
        """See `affinity.LoadBound`.

        Args:
            reserved: Of a replica's slots, those that are not for the calls placed here.
        """
        self._reserved = reserved
        self._bound = LoadBound(factor, idle, busy)
        self._under_way: Counter[ReplicaID] = Counter()
        self._probed_at: dict[ReplicaID, float] = {}
        self._shunned_until: dict[ReplicaID, float] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._placed = metrics.Counter(
            "greenroom_affinity_total",
            description="Calls placed: on their favourite replica, on another one, or wherever was room.",
            tag_keys=("application", "deployment", "placed"),
        ).set_default_tags({"application": self._deployment_id.app_name, "deployment": self._deployment_id.name})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in the order of the call's rank, for callers that only ask and do not send."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        key = None if pending_request is None else _key(pending_request)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in rank(key or uuid4().hex, by_name)]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """The replica for a call. Waits while there is none, or none with room."""
        attempt = 0
        while True:
            while not self.curr_replicas:
                self._replicas_updated_event.clear()
                await self._replicas_updated_event.wait()
            replica = self._place(pending_request)
            if replica is not None:
                self._record_queue_wait_time(pending_request)
                return replica
            await self._wait_for_room(attempt)
            attempt += 1

    def _place(self, pending_request: PendingRequest) -> RunningReplica | None:
        by_name = {replica.replica_id.unique_id: replica for replica in self.curr_replicas.values()}
        loads = {name: self._load(replica) for name, replica in by_name.items()}
        key = _key(pending_request)
        ranked = rank(key or uuid4().hex, by_name, _first(pending_request))
        chosen = place(ranked, loads, EVEN if key is None else self._bound)
        if chosen is None:
            return None
        if key is not None and chosen != ranked[0]:
            self._doubt([by_name[ranked[0]]])
        self._placed.inc(tags={"placed": "any" if key is None else "favourite" if chosen == ranked[0] else "next"})
        return by_name[chosen]

    def _load(self, replica: RunningReplica) -> Load:
        if self._shunned_until.get(replica.replica_id, 0.0) > time.monotonic():
            return FULL
        told = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return Load(
            max(self._under_way[replica.replica_id], told), max(1, replica.max_ongoing_requests - self._reserved)
        )

    async def _wait_for_room(self, attempt: int) -> None:
        """Until a call of this process ends, a replica tells that others' calls have, or a moment has passed."""
        self._room.clear()
        self._doubt(list(self.curr_replicas.values()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._compute_backoff_s(attempt)):
                await self._room.wait()

    def _doubt(self, replicas: Sequence[RunningReplica]) -> None:
        """Ask replicas that look busy how long their queues are: what is known may be other processes' past."""
        now = time.monotonic()
        due = [replica for replica in replicas if now - self._probed_at.get(replica.replica_id, 0.0) >= PROBE_PERIOD_S]
        if due:
            self._probed_at.update((replica.replica_id, now) for replica in due)
            task = asyncio.get_running_loop().create_task(self._probe(due))
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)

    async def _probe(self, replicas: list[RunningReplica]) -> None:
        await self._probe_queue_lens(replicas, PROBE_PATIENCE)
        self._room.set()

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """A call could not be sent there. Others take its calls for a moment, in which it comes back or is found dead:
        without a known queue it would look idle, and be tried again and again."""
        super().on_replica_actor_unavailable(replica_id)
        self._shunned_until[replica_id] = time.monotonic() + SHUN_S

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        present = {replica.replica_id for replica in replicas}
        self._probed_at = {name: at for name, at in self._probed_at.items() if name in present}
        self._shunned_until = {name: until for name, until in self._shunned_until.items() if name in present}
        self._room.set()

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._under_way[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called once for every call that was placed, also where sending it failed before `on_send_request`."""
        self._under_way[replica_id] -= 1
        if self._under_way[replica_id] <= 0:
            del self._under_way[replica_id]
        self._room.set()

    def decrement_queue_len_cache(self, replica_id: ReplicaID) -> None:
        super().decrement_queue_len_cache(replica_id)
        self._room.set()


def _key(pending_request: PendingRequest) -> str | None:
    return pending_request.metadata.session_id or getattr(_argument(pending_request), "affinity", None) or None


def _first(pending_request: PendingRequest) -> int:
    return int(getattr(_argument(pending_request), "rank", 0))


def _argument(pending_request: PendingRequest) -> Any:
    return pending_request.args[0] if pending_request.args else None

"""All replicas of a handle's deployment: how many there are, and what each of them answers."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import DeploymentStatus, ReplicaState

from renderer.errors import EngineError, EngineStartingError

LOOK_S = 0.25


def running_replicas(handle: Any) -> int:
    """Replicas that calls through this handle can reach now; 0 before the handle has been told of any.

    Ray Serve 2.60 keeps it to itself; what it offers instead asks the controller or every replica.
    """
    return len(_reached(handle))


def replica_names(handle: Any) -> frozenset[str]:
    """The unique ids of `running_replicas`."""
    return frozenset(str(replica.unique_id) for replica in _reached(handle))


async def wait_for_replicas(handle: Any) -> None:
    """Until a call through this handle would reach a replica. Nothing is asked for: a tier of none stays one."""
    handle.options(method_name="report")  # begins to listen
    while running_replicas(handle) == 0:  # noqa: ASYNC110  # Serve tells the handle, and the handle tells nobody
        await asyncio.sleep(LOOK_S)


async def resting(handles: Sequence[Any]) -> tuple[bool, ...]:
    """Of each deployment, whether it is meant to have no replica now: none runs, and none is being started.

    The controller is asked once for all.
    """
    status = await asyncio.to_thread(serve.status)
    return tuple(_rests(status, handle) for handle in handles)


def _rests(status: Any, handle: Any) -> bool:
    application = status.applications.get(handle.app_name)
    deployment = None if application is None else application.deployments.get(handle.deployment_name)
    if deployment is None or deployment.status not in (DeploymentStatus.HEALTHY, DeploymentStatus.DOWNSCALING):
        return False
    return not any(number for state, number in deployment.replica_states.items() if state != ReplicaState.STOPPING)


def _reached(handle: Any) -> Collection[Any]:
    router = getattr(handle._router, "_asyncio_router", None)
    chooser = None if router is None else router.request_router
    return () if chooser is None else chooser.curr_replicas


@dataclass(frozen=True, slots=True)
class Answers:
    """What running replicas answered, those that did in time and without an error; and how many were asked."""

    values: tuple[Any, ...]
    asked: int


async def answers_of_all(handle: Any, method: str, timeout_s: float, *arguments: Any) -> Answers:
    """Ask all running replicas.

    Ray Serve's own way to collect the answers gives none as soon as one is late.
    """
    try:
        async with asyncio.timeout(timeout_s):
            calls = await handle.broadcast(method, *arguments)._fetch_replica_results_async()
    except RayServeException:
        return Answers((), 0)
    except TimeoutError:
        return Answers((), running_replicas(handle))
    tasks = [asyncio.ensure_future(call.get_async()) for call in calls]
    _, late = await asyncio.wait(tasks, timeout=timeout_s) if tasks else (set(), set())
    for task, call in zip(tasks, calls, strict=True):
        if task in late:
            task.cancel()
            call.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    answered = tuple(task.result() for task in tasks if not task.cancelled() and task.exception() is None)
    return Answers(answered, len(tasks))


async def obeyed_by_all(handle: Any, method: str, timeout_s: float, *arguments: Any) -> tuple[Any, ...]:
    """What all running replicas answer to a command that every one of them must carry out.

    Raises:
        EngineError: None is running, or one took too long. What a replica raises is raised; the others are done.
    """
    try:
        async with asyncio.timeout(timeout_s):
            calls = await handle.broadcast(method, *arguments)._fetch_replica_results_async()
            answers = await asyncio.gather(*(call.get_async() for call in calls), return_exceptions=True)
    except RayServeException as error:
        raise EngineStartingError(f"{method}: no replica is running") from error
    except TimeoutError as error:
        raise EngineError(f"{method}: not every replica was done within {timeout_s:.0f} s") from error
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    if not answers:
        raise EngineStartingError(f"{method}: no replica is running")
    if failed:
        raise failed[0]
    return tuple(answers)

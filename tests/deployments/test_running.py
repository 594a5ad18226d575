"""Asking all replicas of a deployment. The handle is a stand-in: replicas that are late or fail are at hand so."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

from deployments import backends
from deployments.backends import HandleBackend
from deployments.config import RouterConfig
from deployments.running import Answers, answers_of_all, resting
from deployments.tier import Tier
from renderer.errors import IncompleteError

LATE = object()


class Replica:
    """One broadcast call: an answer, an error, or nothing at all."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome
        self.cancelled = False

    async def get_async(self) -> Any:
        if self._outcome is LATE:
            await asyncio.Event().wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Of a deployment with these replicas."""

    def __init__(self, *outcomes: Any) -> None:
        self.replicas = [Replica(outcome) for outcome in outcomes]
        self._router = None

    def broadcast(self, method: str) -> Any:
        async def fetch() -> list[Replica]:
            if not self.replicas:
                raise RayServeException("no replicas")
            return self.replicas

        return SimpleNamespace(_fetch_replica_results_async=fetch)


async def test_those_that_answer_in_time_are_told_from_those_that_were_asked() -> None:
    handle = Handle(1, LATE, RayActorError(), 2)
    assert await answers_of_all(handle, "report", 0.05) == Answers((1, 2), 4)
    assert [replica.cancelled for replica in handle.replicas] == [False, True, False, False]


async def test_a_deployment_of_none_answers_nothing() -> None:
    assert await answers_of_all(Handle(), "report", 0.05) == Answers((), 0)


RESTING: dict[str, tuple[str, dict[str, int]]] = {
    "running": ("HEALTHY", {"RUNNING": 1}),
    "none": ("HEALTHY", {}),
    "leaving": ("DOWNSCALING", {"STOPPING": 1}),
    "begun": ("UPDATING", {}),
    "starting": ("UPSCALING", {"STARTING": 1}),
}


async def test_the_controller_is_asked_once_which_of_all_tiers_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    deployments = {
        name: SimpleNamespace(status=status, replica_states=states) for name, (status, states) in RESTING.items()
    }

    def status() -> Any:
        asked.append(1)
        return SimpleNamespace(applications={"app": SimpleNamespace(deployments=deployments)})

    monkeypatch.setattr(serve, "status", status)
    handles = [SimpleNamespace(app_name="app", deployment_name=name) for name in (*RESTING, "unknown")]
    assert await resting(handles) == (False, True, True, False, False, False)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("render", "engine", "said"),
    [
        ((None, None), (None,), None),
        ((), (None,), None),
        ((None, LATE), (None,), "2 of 3"),
        ((None, RayActorError()), (RayActorError(),), "1 of 3"),
    ],
)
async def test_caches_are_cleared_everywhere_or_it_is_said_where_they_are(
    render: tuple[Any, ...], engine: tuple[Any, ...], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "CLEAR_TIMEOUT_S", 0.05)
    tiers = {Tier.RENDER: Handle(*render), Tier.ENGINE: Handle(*engine)}
    backend = HandleBackend(tiers, RouterConfig())
    if said is None:
        await backend.clear_mm_cache()
    else:
        with pytest.raises(IncompleteError, match=said) as raised:
            await backend.clear_mm_cache()
        assert raised.value.status == 503

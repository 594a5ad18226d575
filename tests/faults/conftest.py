"""One cluster for all of the fault tests, and the application that most of them disturb: two replicas a tier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.cluster import Deployed, RayCluster, ray_cluster
from tests.stack.conftest import RENDERER, SMALL

TWO = {"num_replicas": 2, "autoscaling_config": None}
TIERS = ("Router", "RenderReplica", "EngineReplica")
# This machine may be slow to start a replacement; no stream should give up on it before. What the tests' own media
# hosts do not send, nobody waits for long.
FETCH = {"internal_networks": ["127.0.0.0/8"], "connect_s": 1, "idle_s": 1, "retries": 0}
PATIENT: dict[str, Any] = {
    **SMALL,
    "engine": {"engine": {**SMALL["engine"]["engine"], "stall_s": 15}},
    "renderer": {**RENDERER, "fetch": FETCH},
    "router": {"failover_s": 120},
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shared(cluster: RayCluster) -> Iterator[Deployed]:
    app = Deployed("faults", cluster, PATIENT, **dict.fromkeys(TIERS, TWO))
    yield app
    app.close()


@pytest.fixture
def app(shared: Deployed) -> Deployed:
    """Two replicas of every tier, all of them running."""
    shared.wait_for_replicas(**dict.fromkeys(TIERS, 2))
    return shared

"""Rolling updates and scale-downs under load: no request fails, no stream is cut, also with one replica a tier."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve

from tests.faults.cluster import START_S, Deployed, RayCluster
from tests.faults.conftest import PATIENT, TIERS, TWO
from tests.faults.traffic import Ask, Traffic, known_answers, longest_gaps, mixed_asks, story
from tests.stack.helpers import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S)]

ONE: dict[str, Any] = {"num_replicas": 1, "autoscaling_config": None}
# Streams of so many tokens are always under way, so that some run across every moment of an update.
LONG = 300
LONG_STREAMS = 8
# Of an update's length, for which a tier may seem to be silent: replicas that start take the machine from those that
# serve. A tier without a replica would be silent for nearly all of it.
LONGEST_GAP = 1 / 3


@pytest.fixture(scope="module")
def single(cluster: RayCluster) -> Iterator[Deployed]:
    """One replica a tier."""
    app = Deployed("single", cluster, PATIENT, **dict.fromkeys(TIERS, ONE))
    yield app
    app.close()


def test_one_replica_a_tier_is_updated_without_a_gap(single: Deployed) -> None:
    before = {replica.name for tier in TIERS for replica in single.replicas(tier)}
    with Traffic(single.url, known(single), clients=8) as traffic:
        traffic.wait_for(20)
        begun = time.monotonic()
        single.update({**PATIENT, "router": {**PATIENT["router"], "render_attempts": 4}}, **dict.fromkeys(TIERS, ONE))
        wait_until(lambda: all(running(single, tier) - before for tier in TIERS), START_S, "replacements run")
        single.wait_until_running()
        single.wait_for_replicas(**dict.fromkeys(TIERS, 1))
        took = time.monotonic() - begun
        traffic.wait_for(20)
    assert (traffic.failures, traffic.broken) == ([], [])
    gaps = longest_gaps(traffic.outcomes)
    print(f"longest times without an answer {gaps}, in an update of {took:.0f} s")
    for tier, gap in gaps.items():
        assert gap < took * LONGEST_GAP, f"nobody served the {tier} tier's requests"
    assert not before & {name for tier in TIERS for name in running(single, tier)}
    seconds = [outcome.seconds for outcome in traffic.outcomes]
    print(f"{len(seconds)} requests: median {statistics.median(seconds):.2f} s, slowest {max(seconds):.2f} s")


def test_an_update_that_cannot_get_warm_leaves_the_replicas_of_before_serving_and_the_next_one_mends_it(
    single: Deployed,
) -> None:
    tiers = {name: {**PATIENT.get(name, {}), "start_attempts": 1} for name in ("render", "engine")}
    broken = {**PATIENT, **tiers, "max_model_len": 32}  # the chat template alone takes more
    before = workers(single)
    with Traffic(single.url, known(single), clients=4) as traffic:
        traffic.wait_for(10)
        single.update(broken, **dict.fromkeys(TIERS, ONE))
        wait_until(lambda: status(single).status == "DEPLOY_FAILED", START_S, "the update has failed")
        failed = status(single)
        traffic.wait_for(20)
        assert workers(single) == before
        single.update(PATIENT, **dict.fromkeys(TIERS, ONE))
        wait_until(lambda: status(single).status == "RUNNING", START_S, "the application runs")
        single.wait_for_replicas(**dict.fromkeys(TIERS, 1))
        traffic.wait_for(20)
    assert (traffic.failures, traffic.broken) == ([], [])
    said = [failed.message, *(deployment.message for deployment in failed.deployments.values())]
    assert any("WarmupError" in message for message in said), said


def workers(app: Deployed) -> set[str]:
    """The replicas that routers reach."""
    return {report.replica for tier in ("render", "engine") for report in app.tiers()[tier]}


def status(app: Deployed) -> Any:
    return serve.status().applications[app.name]


@pytest.mark.parametrize("deployment", TIERS)
def test_nothing_under_way_is_cut_when_a_tier_shrinks(app: Deployed, deployment: str) -> None:
    try:
        with Traffic(app.url, known(app), clients=8) as traffic:
            traffic.wait_for(10)
            app.update(PATIENT, **{**dict.fromkeys(TIERS, TWO), deployment: ONE})
            app.wait_for_replicas(**{deployment: 1})
            traffic.wait_for(10)
    finally:
        app.update(PATIENT, **dict.fromkeys(TIERS, TWO))
    assert (traffic.failures, traffic.broken) == ([], [])


def known(app: Deployed) -> list[tuple[Ask, str]]:
    """Requests of every kind and long streams, with their right answers."""
    asks = mixed_asks(random.Random(5), 16) + [story(number, LONG, temperature=0) for number in range(LONG_STREAMS)]
    return list(zip(asks, known_answers(app.url, asks), strict=True))


def running(app: Deployed, deployment: str) -> set[str]:
    return {replica.name for replica in app.replicas(deployment)}

"""However a replica comes to be, it is warm before its first request: warm-up is long here, and traffic never stops.

Warm-up runs in every thread of a renderer, one after the other: many threads make it long, and nothing is pretended.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.calls import ReplicaReport
from tests.faults.cluster import START_S, Deployed, RayCluster, kill
from tests.faults.conftest import PATIENT, TIERS
from tests.faults.traffic import Ask, Traffic, known_answers, mixed_asks
from tests.stack.helpers import about, picture, wait_until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3 * START_S),
    # Ray 2.60 warns about `metrics_interval_s` in favour of variables that it does not read yet.
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),
]

THREADS = 16
# No picture is remembered: requests of a kind are the same work.
MANY = {"media_threads": THREADS, "render_threads": THREADS, "processor_cache_bytes": 0}
SLOW = {**PATIENT, "renderer": {**PATIENT["renderer"], **MANY}}
# The tiers as the reports name them, and as Serve does.
NAMES = dict(zip(("router", "render", "engine"), TIERS, strict=True))
# Requests that are timed, and on which stages: see `test_first_request`.
TIMED = {"render": ("one render", ("render", "write")), "engine": ("one chat", ("render", "first_token"))}
PICTURES = 24
LATER = 20
BUDGET = 1.2
QUICK = {"upscale_delay_s": 0.5, "downscale_delay_s": 5, "look_back_period_s": 2, "metrics_interval_s": 0.5}
ELASTIC: dict[str, Any] = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 2, **QUICK}}
FIXED: dict[str, Any] = {"num_replicas": 1, "autoscaling_config": None}
LITTLE = {"RenderReplica": {"render_seconds": 0.0001}, "EngineReplica": {"engine_sequences": 0.5}}


@pytest.fixture(scope="module")
def app(cluster: RayCluster) -> Iterator[Deployed]:
    app = Deployed("warm", cluster, SLOW, **dict.fromkeys(TIERS, FIXED))
    yield app
    app.close()


@pytest.fixture(scope="module")
def asks(app: Deployed) -> list[tuple[Ask, str]]:
    asks = mixed_asks(random.Random(6), 16) + [ask for number in range(PICTURES) for ask in one_picture(number)]
    return list(zip(asks, known_answers(app.url, asks), strict=True))


def test_replicas_that_replace_killed_ones_are_warm_before_their_first_request(
    app: Deployed, asks: list[tuple[Ask, str]]
) -> None:
    known = replicas(app)
    with Traffic(app.url, asks) as traffic:
        traffic.wait_for(20)
        for tier in TIERS:
            kill(app.replicas(tier)[0].pid)
        reports = newcomers(app, known)
        wait_for_later(traffic, reports)
    assert traffic.failures == []
    assert_warm(reports)
    assert_as_quick_as_later(traffic, reports)


def test_replicas_of_a_rolling_update_are_warm_before_their_first_request(
    app: Deployed, asks: list[tuple[Ask, str]]
) -> None:
    known = replicas(app)
    with Traffic(app.url, asks) as traffic:
        traffic.wait_for(20)
        app.update({**SLOW, "router": {**SLOW["router"], "render_attempts": 4}}, **dict.fromkeys(TIERS, FIXED))
        reports = newcomers(app, known)
        wait_for_later(traffic, reports)
        app.wait_until_running()
    assert (traffic.failures, traffic.broken) == ([], [])
    assert_warm(reports)
    assert_as_quick_as_later(traffic, reports)


def test_replicas_that_load_adds_are_warm_before_their_first_request_and_go_with_it(
    app: Deployed, asks: list[tuple[Ask, str]]
) -> None:
    scaled = {**ELASTIC["autoscaling_config"], "target_ongoing_requests": 2}
    policy = {
        "policy_function": "deployments.autoscaling:ApplicationPolicy",
        "policy_kwargs": {"tiers": LITTLE},
    }
    app.update(SLOW, policy, **{**dict.fromkeys(TIERS, ELASTIC), "Router": {"autoscaling_config": scaled}})
    app.wait_until_running()
    app.wait_for_replicas(**dict.fromkeys(TIERS, 1))
    known = replicas(app)
    with Traffic(app.url, asks, clients=12) as traffic:
        reports = newcomers(app, known)
        wait_for_later(traffic, reports)
    assert (traffic.failures, traffic.broken) == ([], [])
    assert_warm(reports)
    assert_as_quick_as_later(traffic, reports)
    app.wait_for_replicas(**dict.fromkeys(TIERS, 1))


def replicas(app: Deployed) -> set[str]:
    return {replica.name for tier in TIERS for replica in app.replicas(tier)}


def newcomers(app: Deployed, known: set[str]) -> list[ReplicaReport]:
    """The record of a new replica of every tier, each after its first request."""
    found: dict[str, ReplicaReport] = {}

    def all_there() -> bool:
        with suppress(TimeoutError, RayActorError):  # there may be no router to ask
            for tier, reports in app.tiers().items():
                for report in reports:
                    if report.replica not in known and report.first_request_s is not None:
                        found[tier] = report
        return found.keys() == NAMES.keys()

    wait_until(all_there, START_S, "a new replica of every tier has served")
    return list(found.values())


def assert_warm(reports: list[ReplicaReport]) -> None:
    for report in reports:
        warm_s = sum(report.warmup_s.values())
        print(f"{report.tier}: {warm_s:.1f} s of warm-up, first request in {report.first_request_s or 0:.3f} s")
        assert report.warmup_ended_at is not None
        assert report.first_request_at is not None
        assert report.started_at + warm_s <= report.warmup_ended_at < report.first_request_at
        assert report.tier == "router" or warm_s > 2, "long enough that an early request would have come in it"


def one_picture(number: int) -> list[Ask]:
    """The requests that are timed: one picture each, and the shortest answer."""
    messages = about(picture(number))
    chat = {"messages": messages, "max_tokens": 1, "temperature": 0}
    return [
        Ask("one render", "/v1/chat/completions/render", {"messages": messages}),
        Ask("one chat", "/v1/chat/completions", chat),
    ]


def times(traffic: Traffic, report: ReplicaReport) -> list[float]:
    """Milliseconds that a replica took for its timed requests, in the order in which they were asked."""
    kind, stages = TIMED[report.tier]
    timed = [
        (outcome.begun, sum(outcome.answer.timing.get(stage, 0.0) for stage in stages))
        for outcome in tuple(traffic.outcomes)
        if outcome.answer is not None and outcome.answer.replica == report.replica and outcome.ask.kind == kind
    ]
    return [milliseconds for _, milliseconds in sorted(timed)]


def wait_for_later(traffic: Traffic, reports: list[ReplicaReport]) -> None:
    """Until there are enough requests to compare each newcomer's first one with."""
    timed = [report for report in reports if report.tier in TIMED]
    wait_until(lambda: all(len(times(traffic, report)) > LATER for report in timed), START_S, "requests to compare")


def assert_as_quick_as_later(traffic: Traffic, reports: list[ReplicaReport]) -> None:
    """Beside other traffic single times scatter, so a first one is compared with the range of the later ones; a cold
    one would be far out of it."""
    for report in reports:
        if report.tier in TIMED:
            first, *later = times(traffic, report)
            print(f"{report.tier}: first {first:.1f} ms, later {sorted(round(each, 1) for each in later)}")
            assert first <= BUDGET * max(later[:LATER])

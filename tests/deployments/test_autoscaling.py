"""How many replicas there are. Figures that lie cost money or an outage, whichever way they lie."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.autoscaling import (
    ENGINE_PROMPT_TOKENS,
    ENGINE_SEQUENCES,
    RENDER_SECONDS,
    ApplicationPolicy,
    Gauge,
    TierPolicy,
    at_least_one,
    render_seconds,
    replicas_for,
)
from tests.deployments import scaling_toys

DEADLINE_S = 60.0
# Ray 2.60 warns about `metrics_interval_s` in favour of variables that it does not read yet.
INTERVAL = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
ENGINE = {ENGINE_SEQUENCES: 24, ENGINE_PROMPT_TOKENS: 8192}


def context(
    name: str = "RenderReplica",
    figures: dict[str, list[float]] | None = None,
    *,
    replicas: int = 2,
    target: int | None = None,
    requests: float = 0.0,
    queued: float = 0.0,
    target_requests: float = 2.0,
) -> AutoscalingContext:
    """What Serve's controller hands to a policy; `figures` by name, one value a replica."""
    metrics = {
        key: {f"{name}{place}": value for place, value in enumerate(each)} for key, each in (figures or {}).items()
    }
    return AutoscalingContext(
        deployment_id=name,
        deployment_name=name,
        app_name="greenroom",
        current_num_replicas=replicas,
        target_num_replicas=replicas if target is None else target,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics=metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=100,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(target_ongoing_requests=target_requests),
    )


# Work


def test_a_request_with_64_images_is_not_the_load_of_a_layout() -> None:
    layout = render_seconds(media_bytes=64 * 100_000)
    tensors = render_seconds(pixels=64 * 1280 * 720, media_bytes=64 * 100_000)
    assert tensors > 25 * layout
    assert layout < 0.025


def test_what_only_the_bytes_of_an_image_are_known_of_counts_as_a_photograph() -> None:
    guessed, known = (
        render_seconds(pixels=None, media_bytes=131_000),
        render_seconds(pixels=640 * 480, media_bytes=131_000),
    )
    assert 0.5 < guessed / known < 3


@pytest.mark.parametrize(
    ("figures", "carried", "replicas"),
    [
        ({}, {"work": 2.0}, 0.0),
        ({"work": 0.0}, {"work": 2.0}, 0.0),
        ({"work": 5.0}, {"work": 2.0}, 2.5),
        ({"work": 5.0, "tokens": 900.0}, {"work": 2.0, "tokens": 100.0}, 9.0),  # the scarcest decides
        ({"work": 5.0, "tokens": 900.0}, {"work": 2.0}, 2.5),
    ],
)
def test_replicas_for_table(figures: dict[str, float], carried: dict[str, float], replicas: float) -> None:
    assert replicas_for(figures, carried) == replicas


@pytest.mark.parametrize(
    ("replicas", "requests", "expected"),
    [(0.0, 0.0, 0), (0.0, 0.1, 1), (1e-6, 0.0, 1), (1.0, 5.0, 1), (1.0005, 5.0, 1), (1.01, 0.0, 2), (7.2, 0.0, 8)],
)
def test_replicas_are_whole_and_one_where_there_is_anything(replicas: float, requests: float, expected: int) -> None:
    assert at_least_one(replicas, requests) == expected


# Gauge


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_gauge_reads_the_mean_since_the_last_reading() -> None:
    clock = Clock()
    gauge = Gauge(clock)
    with gauge.under_way(4.0):
        clock.now = 1.0
    clock.now = 4.0
    assert gauge.mean() == 1.0
    gauge.add(2.0)
    clock.now = 6.0
    assert gauge.mean() == 2.0
    assert gauge.mean() == 2.0  # no time has passed: what is under way


def test_work_that_ends_between_two_readings_is_seen() -> None:
    clock = Clock()
    gauge = Gauge(clock)
    clock.now = 1.0
    with gauge.under_way(0.3):
        clock.now = 1.05
    clock.now = 2.0
    assert gauge.mean() == pytest.approx(0.3 * 0.05 / 2)
    clock.now = 4.0
    assert gauge.mean() == 0.0


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 10)), max_size=30))
def test_work_that_has_ended_leaves_nothing(work: list[tuple[float, float]]) -> None:
    clock = Clock()
    gauge = Gauge(clock)
    for amount, seconds in work:
        gauge.add(amount)
        clock.now += seconds
    for amount, _ in reversed(work):
        gauge.add(-amount)
    gauge.mean()
    clock.now += 1.0
    assert gauge.mean() == 0.0


def test_an_error_ends_the_work_under_way() -> None:
    gauge = Gauge()
    with pytest.raises(RuntimeError), gauge.under_way(1.0):
        raise RuntimeError
    assert gauge.level == 0.0


# One tier


@pytest.mark.parametrize(
    ("given_context", "expected"),
    [
        (context(figures={RENDER_SECONDS: [0.0, 0.0]}), 0),
        (context(figures={RENDER_SECONDS: [0.0, 0.0]}, requests=0.01), 1),
        (context(figures={RENDER_SECONDS: [0.2, 0.1]}, requests=3), 1),
        (context(figures={RENDER_SECONDS: [0.9, 0.3]}, requests=3), 3),
        (context(figures={RENDER_SECONDS: [0.9, 0.3]}, requests=100), 3),  # many small ones are not many
        (context(figures={RENDER_SECONDS: [0.9, 0.3]}, requests=6, queued=3), 5),  # half of it waits in handles
        (context(figures={RENDER_SECONDS: [0.0, 0.0]}, requests=3, queued=3), 1),
        (context(figures={}, replicas=3, requests=1), 3),  # nobody has told anything yet
        (context(figures={"else": [5.0]}, replicas=3), 3),
        (context(figures={}, replicas=0), 0),
        (context(figures={}, replicas=0, requests=1), 1),
        (context(figures={}, replicas=0, target=3, requests=1), 3),  # these are starting
        (context(figures={}, replicas=0, target=3), 0),
        (context(figures={RENDER_SECONDS: [0.1]}, replicas=1, target=3), 1),  # Serve's delays hold from here on
    ],
)
def test_a_tier_scales_on_the_work_that_waits(given_context: AutoscalingContext, expected: int) -> None:
    assert TierPolicy({RENDER_SECONDS: 0.5})(given_context) == (expected, {})


@pytest.mark.parametrize(
    ("sequences", "prompt_tokens", "expected"),
    [([20.0], [100.0], 1), ([30.0], [100.0], 2), ([4.0], [30_000.0], 4), ([0.0], [0.0], 0)],
)
def test_the_engine_tier_scales_on_sequences_and_on_prompts_that_wait(
    sequences: list[float], prompt_tokens: list[float], expected: int
) -> None:
    figures = {ENGINE_SEQUENCES: sequences, ENGINE_PROMPT_TOKENS: prompt_tokens}
    assert TierPolicy(ENGINE)(context("EngineReplica", figures)) == (expected, {})


@pytest.mark.parametrize("carried", [{}, {"work": 0.0}, {"work": 1.0, "tokens": -1.0}])
def test_a_replica_that_carries_nothing_is_refused(carried: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must carry something"):
        TierPolicy(carried)
    with pytest.raises(ValueError, match="must carry something"):
        ApplicationPolicy({"RenderReplica": carried})


# All tiers

TIERS: dict[str, dict[str, float]] = {"RenderReplica": {RENDER_SECONDS: 0.5}, "EngineReplica": {ENGINE_SEQUENCES: 24}}


def decided(*contexts: AutoscalingContext) -> dict[str, float]:
    decisions, state = ApplicationPolicy(TIERS)({each.deployment_id: each for each in contexts})
    assert state == {}
    return decisions


def test_what_waits_in_the_routers_counts() -> None:
    router = context("Router", {RENDER_SECONDS: [1.2, 1.4]}, requests=40, target_requests=10)
    render = context(figures={RENDER_SECONDS: [0.4, 0.4]}, requests=8)
    assert decided(router, render) == {"Router": 4, "RenderReplica": 6}


def test_work_that_the_tier_and_a_router_both_see_counts_once() -> None:
    router = context("Router", {RENDER_SECONDS: [1.0]}, replicas=1, requests=4, target_requests=10)
    render = context(figures={RENDER_SECONDS: [0.5, 0.5]}, requests=4)
    assert decided(router, render)["RenderReplica"] == 2


def test_work_that_came_past_the_routers_counts_too() -> None:
    router = context("Router", {RENDER_SECONDS: [0.0]}, replicas=1)
    render = context(figures={RENDER_SECONDS: [2.0, 0.0]}, requests=3)
    assert decided(router, render) == {"Router": 0, "RenderReplica": 4}


def test_a_tier_of_no_replicas_starts_while_its_work_is_served_elsewhere() -> None:
    router = context("Router", {RENDER_SECONDS: [0.01]}, replicas=1, requests=1)
    assert decided(router, context(replicas=0))["RenderReplica"] == 1
    idle = context("Router", {RENDER_SECONDS: [0.0]}, replicas=1)
    assert decided(idle, context(replicas=0))["RenderReplica"] == 0


def test_a_tier_whose_first_replicas_are_starting_does_not_waver() -> None:
    router = context("Router", {RENDER_SECONDS: [0.2]}, replicas=1, requests=1)
    assert decided(router, context(replicas=0, target=2))["RenderReplica"] == 2
    assert decided(context("Router", replicas=0, target=2, requests=1))["Router"] == 2


def test_a_figure_scales_only_the_tiers_that_carry_it() -> None:
    router = context("Router", {RENDER_SECONDS: [5.0], ENGINE_SEQUENCES: [30.0]}, replicas=1, requests=30)
    engine = context("EngineReplica", {ENGINE_SEQUENCES: [29.0]}, replicas=1, requests=29)
    assert decided(router, engine)["EngineReplica"] == 2


# In Serve's controller


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("TierPolicy", {"carried": {RENDER_SECONDS: 0.5}}), ("ApplicationPolicy", {"tiers": TIERS})],
)
def test_a_policy_runs_in_a_controller_that_imports_nothing_of_ours(name: str, arguments: dict[str, Any]) -> None:
    policy = AutoscalingPolicy(policy_function=f"deployments.autoscaling:{name}", policy_kwargs=arguments)
    pickled = policy.get_serialized_policy_def()
    assert pickled is not None
    script = (
        "import pickle, sys\n"
        f"policy = pickle.loads(sys.stdin.buffer.read())(**{arguments!r})\n"
        "assert callable(policy)\n"
        "print(sorted(name for name in sys.modules if name.startswith(('deployments', 'renderer', 'torch'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


@pytest.fixture(scope="module")
def serving() -> Iterator[None]:
    ours = not ray.is_initialized()
    if ours:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        serve.start(proxy_location="Disabled")
    yield
    serve.delete("scaling")
    if ours:
        serve.shutdown()
        ray.shutdown()


def wait_for_workers(number: int) -> None:
    """Until so many workers run, and none is starting or stopping."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        states = serve.status().applications["scaling"].deployments["Worker"].replica_states
        counts = {str(state): count for state, count in states.items()}
        if sum(counts.values()) == number and set(counts) <= {"RUNNING"}:
            return
        assert time.monotonic() < deadline, counts
        time.sleep(0.05)


@INTERVAL
def test_a_tier_grows_from_nothing_on_its_routers_word_and_on_its_own_and_shrinks_to_nothing(serving: None) -> None:
    config = {
        "name": "scaling",
        "route_prefix": None,
        "import_path": "tests.deployments.scaling_toys:application",
        "autoscaling_policy": {
            "policy_function": "deployments.autoscaling:ApplicationPolicy",
            "policy_kwargs": {"tiers": {"Worker": {RENDER_SECONDS: 2.0}}},
        },
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [config]}), _blocking=True)
    front = serve.get_app_handle("scaling")
    wait_for_workers(0)
    front.load.remote(5.0).result(timeout_s=DEADLINE_S)
    wait_for_workers(3)
    front.load.remote(1.0).result(timeout_s=DEADLINE_S)
    wait_for_workers(1)
    front.load_workers.remote(4.0).result(timeout_s=DEADLINE_S)
    wait_for_workers(2)
    front.load.remote(0.0).result(timeout_s=DEADLINE_S)
    front.load_workers.remote(0.0).result(timeout_s=DEADLINE_S)
    wait_for_workers(0)


@INTERVAL
def test_a_tier_of_its_own_grows_and_shrinks_with_its_work(serving: None) -> None:
    policy = AutoscalingPolicy(
        policy_function="deployments.autoscaling:TierPolicy", policy_kwargs={"carried": {RENDER_SECONDS: 2.0}}
    )
    worker = serve.run(
        scaling_toys.deployment(scaling_toys.Worker, 1, 4, policy=policy).bind(), name="scaling", route_prefix=None
    )
    wait_for_workers(1)
    worker.load.remote(7.0).result(timeout_s=DEADLINE_S)
    wait_for_workers(4)
    worker.broadcast("load", 0.0).results(timeout_s=DEADLINE_S)
    wait_for_workers(1)

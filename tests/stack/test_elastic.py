"""The render tier grows with the work that waits, shrinks to nothing without, and nothing fails meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tests.stack.conftest import SMALL
from tests.stack.helpers import Application, about, picture, wait_until

# Ray 2.60 warns about `metrics_interval_s` in favour of variables that it does not read yet.
pytestmark = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
QUICK = {"upscale_delay_s": 0.5, "downscale_delay_s": 2, "look_back_period_s": 1, "metrics_interval_s": 0.3}
BODY = {"messages": about(*(picture(number) for number in range(8)))}


@pytest.fixture(scope="module")
def elastic(cluster: str) -> Iterator[Application]:
    policy = "deployments.autoscaling:ApplicationPolicy"
    tiers = {"RenderReplica": {"render_seconds": 0.0004}, "EngineReplica": {"engine_sequences": 24}}
    scaling = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 2, **QUICK}
    config = {
        "name": "elastic",
        "route_prefix": "/elastic",
        "import_path": "deployments.app:build",
        "args": {**SMALL, "router": {"overflow": True}},
        "autoscaling_policy": {"policy_function": policy, "policy_kwargs": {"tiers": tiers}},
        "deployments": [
            {"name": "Router", "autoscaling_config": {"min_replicas": 1, "max_replicas": 1, **QUICK}},
            {"name": "RenderReplica", "autoscaling_config": scaling},
            {"name": "EngineReplica", "autoscaling_config": {"min_replicas": 1, "max_replicas": 1, **QUICK}},
        ],
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [config]}))
    wait_until(lambda: serve.status().applications["elastic"].status == "RUNNING", 180, "the application runs")
    application = Application("elastic", f"{cluster}/elastic", serve.get_app_handle("elastic"))
    yield application
    application.http.close()
    serve.delete("elastic")


def running() -> int:
    states = serve.status().applications["elastic"].deployments["RenderReplica"].replica_states
    return sum(number for state, number in states.items() if state == "RUNNING")


def test_nothing_starts_a_tier_of_none_but_work_for_it(elastic: Application) -> None:
    """Neither a router that starts, nor the engine replicas that would borrow from it, nor who asks for reports."""
    router = elastic.report("router")
    assert router.warmup_s["tiers"] < 60, "it waits for the engine's start alone"
    assert elastic.tiers()["render"] == ()
    assert elastic.post("/v1/clear_mm_cache", {}).status_code == 200
    states = serve.status().applications["elastic"].deployments["RenderReplica"].replica_states
    assert states == {}


def test_the_render_tier_grows_from_nothing_under_load_and_shrinks_to_nothing_and_no_request_fails(
    elastic: Application,
) -> None:
    first = elastic.post("/v1/chat/completions/render", BODY)
    assert (first.status_code, first.headers["X-Greenroom-Tier"]) == (200, "engine")
    enough = Event()
    with ThreadPoolExecutor(6) as pool:
        flood = [pool.submit(_ask_until, elastic, enough) for _ in range(6)]
        try:
            wait_until(lambda: running() == 2, 150, "the render tier has grown")
        finally:
            enough.set()
        responses = [response for each in flood for response in each.result()]
    assert {response.status_code for response in responses} == {200}
    last = elastic.post("/v1/chat/completions/render", BODY)
    assert (last.status_code, last.headers["X-Greenroom-Tier"]) == (200, "render")
    wait_until(lambda: running() == 0, 120, "the render tier has shrunk to nothing")
    assert elastic.post("/v1/chat/completions/render", BODY).status_code == 200


def _ask_until(application: Application, enough: Event) -> list[httpx.Response]:
    responses: list[httpx.Response] = []
    while not enough.is_set():
        responses.append(application.post("/v1/chat/completions/render", BODY))
    return responses

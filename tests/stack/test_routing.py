"""Three engine replicas: conversations find the one that holds them, and what is admitted is counted exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tests.stack.conftest import SMALL
from tests.stack.helpers import Application, about, picture, wait_until

REPLICAS = 3
REQUESTS = 4  # generation requests under way, for each engine replica
ARGUMENTS = {
    **SMALL,
    "router": {
        "admission": {"generation": {"requests": REQUESTS}, "render": {"requests": 1}, "retry_after_s": 3},
        "overflow": True,
    },
}


@pytest.fixture(scope="module")
def three(cluster: str) -> Iterator[Application]:
    config = {
        "name": "three",
        "route_prefix": "/three",
        "import_path": "deployments.app:build",
        "args": ARGUMENTS,
        "deployments": [{"name": "EngineReplica", "num_replicas": REPLICAS, "autoscaling_config": None}],
    }
    schema = ServeDeploySchema.model_validate({"applications": [config]})
    _get_global_client().deploy_apps(schema)
    wait_until(lambda: serve.status().applications["three"].status == "RUNNING", 180, "the application runs")
    application = Application("three", f"{cluster}/three", serve.get_app_handle("three"))
    wait_until(lambda: len(application.tiers()["engine"]) == REPLICAS, 60, "three engine replicas")
    yield application
    application.http.close()
    serve.delete("three")


def test_later_turns_of_conversations_reach_the_replica_that_holds_their_images(three: Application) -> None:
    def turns(number: int) -> tuple[list[str], int]:
        messages = about(picture(number))
        first = three.post("/v1/chat/completions", {"messages": messages, "temperature": 0})
        answer = first.json()["choices"][0]["message"]
        messages += [answer, {"role": "user", "content": "What shape is it?"}]
        second = three.post("/v1/chat/completions", {"messages": messages, "temperature": 0})
        cached = second.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return [response.headers["X-Greenroom-Replica"] for response in (first, second)], cached

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(turns, range(24)))
    hits = sum(first == second for (first, second), _ in results)
    assert hits >= 0.9 * len(results)
    assert sum(cached > 0 for _, cached in results) >= 0.9 * len(results)
    assert len(Counter(first for (first, _), _ in results)) == REPLICAS


def test_a_repeated_image_is_a_hit_whatever_is_asked_about_it(three: Application) -> None:
    replicas = {
        three.post("/v1/chat/completions", {"messages": about(picture(40), text=text)}).headers["X-Greenroom-Replica"]
        for text in ("What colour is the shape?", "What shape is it?", "Describe the picture.")
    }
    assert len(replicas) == 1


def test_generation_beyond_the_limit_is_refused_at_once_and_says_when_to_come_back(three: Application) -> None:
    body = {"messages": about(picture(1), text="Tell me a story."), "max_tokens": 200, "ignore_eos": True}
    limit = REQUESTS * REPLICAS
    with ThreadPoolExecutor(2 * limit) as pool:
        responses = list(pool.map(lambda _: three.post("/v1/chat/completions", body), range(2 * limit)))
    statuses = Counter(response.status_code for response in responses)
    assert statuses == {200: limit, 503: limit}
    refused = next(response for response in responses if response.status_code == 503)
    assert refused.headers["Retry-After"] == "3"
    assert refused.json()["error"]["type"] == "ServiceUnavailableError"
    again = three.post("/v1/chat/completions", {"messages": about(picture(1))})
    assert again.status_code == 200


def test_render_only_requests_that_find_the_render_tier_full_go_to_readonly_processors_beside_engines(
    three: Application,
) -> None:
    before = [report.caches["sender"] for report in three.tiers()["engine"]]
    body = {"messages": about(*(picture(number) for number in range(8)))}
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(lambda _: three.post("/v1/chat/completions/render", body), range(12)))
    assert {response.status_code for response in responses} == {200}
    assert {response.headers["X-Greenroom-Tier"] for response in responses} == {"render", "engine"}
    assert len({response.json()["features"]["mm_hashes"]["image"][0] for response in responses}) == 1
    assert [report.caches["sender"] for report in three.tiers()["engine"]] == before
    elsewhere = sum(response.headers["X-Greenroom-Tier"] == "engine" for response in responses)
    wait_until(lambda: overflowed() == elsewhere, 30, "what went elsewhere is counted")


def overflowed() -> float:
    """As Prometheus would see it."""
    (node,) = ray.nodes()
    page = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10).text
    samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
    return sum(
        sample.value
        for sample in samples
        if sample.name == "ray_greenroom_overflow_total" and sample.labels["application"] == "three"
    )

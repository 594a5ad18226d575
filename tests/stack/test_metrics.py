"""What a Prometheus would scrape of the cluster, after requests whose number is known."""

from __future__ import annotations

import time
from collections import defaultdict

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import Metrics
from tests.stack.helpers import Application, about, picture, wait_until

STORY = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 12, "ignore_eos": True}
# Ray's processes hand their counts on every 10 s.
TELLING_S = 12
# Nothing of these happens here.
RARE = {"overflow", "broken_streams", "retries", "continued_streams", "borrowed_items"}


def samples() -> dict[str, float]:
    """Values of all replicas of the application together, by metric and its labels beside Serve's own."""
    values: dict[str, float] = defaultdict(float)
    for node in ray.nodes():
        page = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10).text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.labels.get("application") == "greenroom":
                    labels = sorted({*sample.labels} & {"tier", "operation", "status", "cache", "stage", "kind", "le"})
                    name = ",".join([sample.name, *(f"{label}={sample.labels[label]}" for label in labels)])
                    values[name] += sample.value
    return values


def settled() -> dict[str, float]:
    """Values once all that others have done is told: nothing has grown for longer than telling takes."""
    seen, since = samples(), time.monotonic()

    def unchanged() -> bool:
        nonlocal seen, since
        now = samples()
        if counted(now) != counted(seen):
            seen, since = now, time.monotonic()
        return time.monotonic() - since > TELLING_S

    wait_until(unchanged, 90, "earlier requests are told")
    return seen


def counted(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if "greenroom" in name and "_total" in name}


@pytest.fixture(scope="module")
def scraped(whole: Application) -> tuple[dict[str, float], dict[str, float]]:
    """Before and after a few requests of every kind."""
    before = settled()
    body = {"messages": about(picture(50), picture(51)), "max_tokens": 12, "ignore_eos": True}
    for path, sent in (
        ("/v1/chat/completions", body),
        ("/v1/chat/completions", {**body, "stream": True}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions/render", body),
        ("/v1/chat/completions/render", {**body, "mm_payload": "none"}),
    ):
        whole.post(path, sent)
    done = "ray_greenroom_requests_total,operation=render,status=200,tier=render"
    wait_until(lambda: samples()[done] >= before[done] + 2, 60, "the requests are told")
    told = "ray_greenroom_cache_hits_total,cache=sender"
    wait_until(lambda: samples()[told] >= before[told] + 2, 60, "the caches' totals are told")
    return before, samples()


def test_requests_are_counted_by_tier_operation_and_status(
    scraped: tuple[dict[str, float], dict[str, float]],
) -> None:
    assert grown(scraped, "requests_total,operation=chat_completions,status=200,tier=router") == 2
    assert grown(scraped, "requests_total,operation=chat_completions,status=400,tier=router") == 1
    assert grown(scraped, "requests_total,operation=generate,status=200,tier=engine") == 2
    assert grown(scraped, "requests_total,operation=render,status=200,tier=render") == 2


def test_items_tokens_and_their_times_are_counted(scraped: tuple[dict[str, float], dict[str, float]]) -> None:
    assert grown(scraped, "items_total,kind=processed,tier=engine") == 4
    assert grown(scraped, "items_total,kind=processed,tier=render") == 2
    assert grown(scraped, "items_total,kind=layout,tier=render") == 2
    assert grown(scraped, "output_tokens_total") == 24
    assert grown(scraped, "prompt_tokens_total") > grown(scraped, "cached_tokens_total") > 0
    assert grown(scraped, "time_to_first_token_seconds_count") == 2
    assert 0 < grown(scraped, "time_between_tokens_seconds_count") <= 22, "tokens that come together count once"
    between = grown(scraped, "time_between_tokens_seconds_count")
    assert grown(scraped, "time_between_tokens_seconds_bucket,le=+Inf") == between
    assert grown(scraped, "stage_seconds_count,stage=render,tier=engine") == 2
    assert grown(scraped, "stage_seconds_count,stage=write,tier=render") == 2


def test_caches_are_counted_as_their_reports_say(
    whole: Application, scraped: tuple[dict[str, float], dict[str, float]]
) -> None:
    assert grown(scraped, "cache_misses_total,cache=sender") >= 2
    assert grown(scraped, "cache_hits_total,cache=sender") >= 2
    assert scraped[1]["ray_greenroom_cache_bytes,cache=sender"] == whole.cache("engine", "sender").bytes


def test_every_metric_that_something_happened_for_is_exported(
    scraped: tuple[dict[str, float], dict[str, float]],
) -> None:
    exported = {name.partition(",")[0] for name in scraped[1]}
    defined = [
        each._name
        for name, value in vars(Metrics()).items()
        if name not in RARE
        for each in (value.values() if isinstance(value, dict) else [value])
    ]
    quiet = {"greenroom_cache_uncached", "greenroom_cache_evictions", "greenroom_engine_aborted"}
    quiet |= {"greenroom_engine_restarts", "greenroom_engine_receiver_misses", "greenroom_engine_encoder_hits"}
    missing = [
        name
        for name in defined
        if name not in quiet and not exported & {f"ray_{name}", f"ray_{name}_total", f"ray_{name}_count"}
    ]
    assert not missing


def grown(scraped: tuple[dict[str, float], dict[str, float]], name: str) -> float:
    before, after = scraped
    return after[f"ray_greenroom_{name}"] - before[f"ray_greenroom_{name}"]

"""No replica can be reached before it is warm, and one that cannot get warm says why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import httpx
import pytest
from ray import serve

from deployments.app import build_render
from deployments.config import GreenroomConfig
from renderer.caches import CacheStats
from tests.stack.helpers import Application, about, picture

# Warm-up runs in every thread, one after the other: this many make it long, and nothing about it is pretended.
MANY_THREADS = {"media_threads": 24, "render_threads": 24}


def test_every_replica_records_its_warm_up_and_its_first_request(whole: Application) -> None:
    whole.post("/v1/chat/completions", {"messages": about(picture(0)), "max_tokens": 1})
    whole.post("/v1/chat/completions/render", {"messages": about(picture(0))})
    tiers = whole.http.get("/health").json()["tiers"]
    assert set(tiers) == {"router", "render", "engine"}
    for replica in (replica for tier in tiers.values() for replica in tier):
        assert replica["started_at"] < replica["warmup_ended_at"] < replica["first_request_at"]
        assert sum(replica["warmup_s"].values()) <= replica["warmup_ended_at"] - replica["started_at"]
    assert {"chat template", "mm_processor", "readonly_mm_processor"} <= tiers["render"][0]["warmup_s"].keys()
    assert {"engine", "mm_processor", "readonly_mm_processor"} <= tiers["engine"][0]["warmup_s"].keys()


def test_a_replica_is_not_routable_before_its_warm_up_ends(cluster: str, deploy: Callable[..., Application]) -> None:
    renderer = {**MANY_THREADS, "warmup": "strict"}
    config = GreenroomConfig.model_validate({"model": "demo/model", "renderer": renderer, "engine": None})
    answers: list[tuple[float, httpx.Response]] = []
    stop = threading.Event()

    def knock() -> None:
        """Ask all the time, from before the deployment on, until the first answer."""
        with httpx.Client(timeout=60) as http:
            while not stop.is_set() and not answers:
                response = http.post(f"{cluster}/slow/tokenize", json={"prompt": "Hello"})
                if response.status_code == 200:
                    answers.append((time.time(), response))

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        app = deploy("slow", build_render(config))
        thread.join(60)
    finally:
        stop.set()
        thread.join(60)
    report = app.report("render")
    warm_s = sum(report.warmup_s.values())
    serve.delete("slow")
    (answer,) = answers
    assert report.caches == {"processor": CacheStats()}, "warm-up leaves no trace"
    assert report.warmup_ended_at is not None
    assert report.first_request_at is not None
    assert warm_s > 1, "long enough that an early request would have come in it"
    assert report.started_at + warm_s <= report.warmup_ended_at
    assert report.warmup_ended_at < report.first_request_at < answer[0]


def test_a_replica_that_cannot_get_warm_never_serves_and_says_why(cluster: str) -> None:
    config = GreenroomConfig.model_validate(
        {
            "model": "demo/model",
            "max_model_len": 32,  # the chat template alone takes more
            "engine": None,
            "render": {"start_attempts": 1},
        }
    )
    with pytest.raises(RuntimeError, match="broken"):
        serve.run(build_render(config), name="broken", route_prefix="/broken")
    deployment = serve.status().applications["broken"].deployments["RenderIngress"]
    serve.delete("broken")
    assert deployment.replica_states.get("RUNNING", 0) == 0
    assert "WarmupError: warm-up failed: chat template: ContextLengthError" in deployment.message

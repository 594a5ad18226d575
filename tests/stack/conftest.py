"""One real Ray cluster for all of the stack's tests, and the applications that they share."""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from deployments.app import build, build_render
from deployments.config import GreenroomConfig
from tests.stack.helpers import ITEM_BYTES, Application

# An engine cache of three pictures: evictions are what the tests about drift need.
CACHED_PICTURES = 3
# Pictures are fetched from loopback by this name alone.
RENDERER: dict[str, Any] = {
    "media_threads": 1,
    "render_threads": 2,
    "fetch": {"internal_hosts": ["localhost"], "backoff_s": 0},
}
JSON_LOGS = LoggingConfig(encoding="JSON")
FEW_TOKENS, TOKEN_BYTES = 2048 + 16, 2 * 4 * 2 * 32 * 4  # keys and values, layers, heads, size, float32
SMALL: dict[str, Any] = {
    "model": "demo/model",
    "renderer": RENDERER,
    "engine": {"engine": {"mm_cache_bytes": CACHED_PICTURES * ITEM_BYTES, "kv_cache_bytes": 64 * 2**20}},
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The cluster's HTTP address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=JSON_LOGS)
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="session")
def deploy(cluster: str) -> Iterator[Callable[..., Application]]:
    """Deploys an application under a name, which is its route too, and waits until it runs."""
    applications: list[Application] = []

    def run(name: str, app: Any) -> Application:
        handle = serve.run(app, name=name, route_prefix=f"/{name}", logging_config=JSON_LOGS)
        applications.append(Application(name, f"{cluster}/{name}", handle))
        return applications[-1]

    yield run
    for application in applications:
        application.http.close()


@pytest.fixture(scope="session")
def whole(deploy: Callable[..., Application]) -> Application:
    """All three tiers."""
    return deploy("greenroom", build(GreenroomConfig.model_validate(SMALL)))


@pytest.fixture(scope="session")
def alone(deploy: Callable[..., Application]) -> Application:
    """No render tier: engine replicas serve render-only requests, beside their sender caches. The engine's blocks hold
    less than the model takes."""
    engine = {"engine": {**SMALL["engine"]["engine"], "kv_cache_bytes": FEW_TOKENS * TOKEN_BYTES}}
    return deploy("alone", build(GreenroomConfig.model_validate({**SMALL, "render": None, "engine": engine})))


@pytest.fixture(scope="session")
def render_only(deploy: Callable[..., Application]) -> Application:
    """Render replicas that are the ingress themselves."""
    config = GreenroomConfig.model_validate({"model": "demo/model", "renderer": RENDERER, "engine": None})
    return deploy("render", build_render(config))

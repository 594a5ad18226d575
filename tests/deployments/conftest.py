"""A render tier in this process, of whatever a test module configures, and what is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from ray.serve import metrics

from deployments.backends import LocalBackend
from deployments.config import GreenroomConfig
from deployments.front import Front
from deployments.http.routes import http_app
from deployments.operations import Operations
from deployments.records import Record
from deployments.rendering import RenderOnly
from renderer.renderer import Renderer


@pytest.fixture(scope="module")
def renderer(request: pytest.FixtureRequest) -> Iterator[Renderer]:
    """The render tier's renderer, by the module's `CONFIG`."""
    config: GreenroomConfig = request.module.CONFIG
    assert config.render is not None
    renderer = Renderer(config.render.renderer)
    yield renderer
    renderer.close()


@pytest.fixture
def operations(request: pytest.FixtureRequest, renderer: Renderer) -> Operations:
    """The operations of a render replica that is its own ingress."""
    record = Record("render")
    return Operations(Front(request.module.CONFIG, LocalBackend(RenderOnly(renderer, record))), record)


@pytest.fixture
async def http(operations: Operations) -> AsyncIterator[httpx.AsyncClient]:
    """A client of their routes."""
    transport = httpx.ASGITransport(http_app(operations))
    async with httpx.AsyncClient(transport=transport, base_url="http://greenroom") as client:
        yield client


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What has been counted since: increments by a counter's name and the values of its tags."""
    grown: Counter[str] = Counter()
    count = metrics.Counter.inc

    def inc(counter: Any, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        name = counter._name.removeprefix("greenroom_").removesuffix("_total")
        grown[" ".join([name, *(tags or {}).values()])] += int(value)
        count(counter, value, tags)

    monkeypatch.setattr(metrics.Counter, "inc", inc)
    return grown

"""A render tier in this process, of whatever a test module configures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

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

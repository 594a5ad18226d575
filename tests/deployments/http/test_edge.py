"""The edge before the routes, over real HTTP: a server on loopback, raw sockets where a client would be too good."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from deployments.backends import LocalBackend
from deployments.config import GreenroomConfig
from deployments.front import Front
from deployments.http.edge import OPEN_PATHS, route_path
from deployments.http.routes import http_app
from deployments.operations import Operations
from deployments.records import Record
from deployments.rendering import RenderOnly
from renderer.renderer import Renderer

LIMIT = 20_000
KEY = "a-key-of-the-test"
CONFIG = {
    "model": "demo/model",
    "renderer": {"media_threads": 1, "render_threads": 1},
    "router": {"max_body_bytes": LIMIT, "api_keys": ["env:GREENROOM_TEST_KEYS"]},
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    config = GreenroomConfig.model_validate(CONFIG)
    assert config.render is not None
    renderer = Renderer(config.render.renderer)
    yield renderer
    renderer.close()


@pytest.fixture
def app(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setenv("GREENROOM_TEST_KEYS", f"{KEY},another")
    backend = LocalBackend(RenderOnly(renderer, Record("render")))
    return http_app(Operations(Front(GreenroomConfig.model_validate(CONFIG), backend), Record("router")))


@pytest.fixture
async def url(app: FastAPI) -> AsyncIterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


async def test_every_route_but_health_asks_for_a_key(app: FastAPI, url: str) -> None:
    paths = [
        (method, path)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
        if path not in OPEN_PATHS
    ]
    assert len(paths) > 12
    async with httpx.AsyncClient(base_url=url) as client:
        for method, path in [*paths, ("get", "/openapi.json"), ("get", "/nowhere")]:
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                response = await client.request(method, path, headers=headers)
                error = response.json()["error"]
                assert (response.status_code, error["type"], error["code"]) == (401, "AuthenticationError", 401), path
                assert response.headers["www-authenticate"] == "Bearer"


async def test_health_is_open_and_shows_no_key(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        for path in ("/health/", "/health/x", "//health"):
            assert (await client.get(path)).status_code == 401
    # Without a cluster there is nobody to report; what matters is that the question is let through.
    async with httpx.AsyncClient(base_url=url) as client:
        response = await client.get("/health")
    assert response.status_code != 401
    assert KEY not in response.text


@pytest.mark.parametrize("prefix", ["", "/render", "/a/b"])
def test_health_is_open_below_the_applications_prefix_and_nothing_else_is(prefix: str) -> None:
    assert route_path({"root_path": prefix, "path": f"{prefix}/health"}) in OPEN_PATHS
    for path in (f"{prefix}/v1/models", f"{prefix}/health/", f"{prefix}/health/health", f"/x{prefix}/health"):
        assert route_path({"root_path": prefix, "path": path}) not in OPEN_PATHS, path


async def test_openais_client_sends_its_key_and_raises_its_own_error_without(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="only renders"):
            await client.completions.create(model="demo/model", prompt="a")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_a_body_up_to_the_limit_is_taken(http: httpx.AsyncClient) -> None:
    body = json.dumps({"prompt": "a"}).encode()
    response = await http.post("/tokenize", content=body.ljust(LIMIT), headers={"Content-Type": "application/json"})
    assert response.status_code == 200


async def test_a_body_that_is_announced_as_too_large_is_refused_before_it_is_sent(url: str) -> None:
    head = (
        f"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {LIMIT + 1}\r\n\r\n"
    )
    status, error = await _answer(url, head.encode())
    assert (status, error["type"], error["code"]) == (413, "RequestEntityTooLargeError", 413)
    assert f"{LIMIT} bytes" in error["message"]


async def test_a_body_that_turns_out_too_large_is_refused_while_it_is_sent(url: str) -> None:
    head = (
        f"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    status, error = await _answer(url, head.encode() + chunk * (LIMIT // 0x1000 + 1))
    assert (status, error["type"]) == (413, "RequestEntityTooLargeError")


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {}])
async def test_what_a_refused_client_still_sends_is_read_before_it_is_answered(
    url: str, headers: dict[str, str]
) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(200):
            sent += LIMIT
            yield b" " * LIMIT

    async with httpx.AsyncClient(base_url=url) as client:
        announced = {"Content-Length": str(200 * LIMIT), "Content-Type": "application/json", **headers}
        response = await client.post("/tokenize", content=body(), headers=announced)
    assert response.status_code == (413 if headers else 401)
    assert sent == 200 * LIMIT


async def test_a_client_that_asks_before_it_sends_is_answered_at_once(url: str) -> None:
    head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {LIMIT}\r\n\r\n"
    status, error = await _answer(url, head.encode())
    assert (status, error["type"]) == (401, "AuthenticationError")


async def test_every_answer_says_who_gave_it_and_how_long_it_took(http: httpx.AsyncClient) -> None:
    statuses = set()
    for headers, path, body in (
        ({}, "/tokenize", {"prompt": "a"}),
        ({}, "/tokenize", {}),
        ({}, "/nowhere", {}),
        ({"Authorization": ""}, "/tokenize", {}),
        ({}, "/tokenize", {"prompt": "a" * LIMIT}),
    ):
        response = await http.post(path, json=body, headers=headers)
        statuses.add(response.status_code)
        assert response.headers["x-greenroom-tier"] in ("router", "render")
        assert response.headers["x-greenroom-replica"]
        assert "total;dur=" in response.headers["server-timing"]
    assert statuses == {200, 400, 401, 404, 413}


async def _answer(url: str, sent: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of the answer to bytes after which the client sends no more."""
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    try:
        writer.write(sent)
        received = await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]

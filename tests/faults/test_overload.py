"""Overload: what does not fit is refused at once, and rendering never takes generation's place."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.faults.cluster import START_S, Deployed, RayCluster
from tests.faults.conftest import PATIENT, TIERS
from tests.faults.traffic import client, slow
from tests.stack.helpers import about, picture, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S)]

RENDERS = 4  # render-only requests under way that the router admits
FLOOD = 24
MEDIA_BYTES = 2**20
CHAT = "/v1/chat/completions"
RENDER = "/v1/chat/completions/render"
LIMITS = {
    "render": {"requests": RENDERS},
    "generation": {"requests": 16, "media_bytes": MEDIA_BYTES},
    "retry_after_s": 2,
}
ARGS = {**PATIENT, "router": {**PATIENT["router"], "admission": LIMITS}}
ONE = {"num_replicas": 1, "autoscaling_config": None}


@pytest.fixture(scope="module")
def app(cluster: RayCluster) -> Iterator[Deployed]:
    app = Deployed("overload", cluster, ARGS, **dict.fromkeys(TIERS, ONE))
    yield app
    app.close()


async def test_a_flood_of_rendering_is_refused_at_once_and_generation_goes_on_beside_it(app: Deployed) -> None:
    # Written once: the clients, in this process, should not be what is slow.
    flood = [json.dumps(slow("render", number, photographs=4).body).encode() for number in range(3)]
    async with client(app.url) as http:
        await _generate(http)  # the connection, and this picture's place in the caches
        alone = [await _generate(http) for _ in range(8)]
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            floods = [group.create_task(_flood(http, flood[number % 3], over)) for number in range(FLOOD)]
            await asyncio.sleep(1)  # until the flood is there; what is measured comes after
            beside = [await _generate(http) for _ in range(8)]
            refusals = [seconds for seconds in [await _refusal(http) for _ in range(24)] if seconds is not None]
            over.set()
    answers = [answer for flooded in floods for answer in flooded.result()]
    refused = [(response, seconds) for response, seconds in answers if response.status_code == 503]
    served = [response for response, _ in answers if response.status_code == 200]
    assert len(refused) + len(served) == len(answers)
    assert served
    assert len(refused) > len(served), "most of a flood is refused"
    assert {response.headers["Retry-After"] for response, _ in refused} == {"2"}
    assert {response.json()["error"]["type"] for response, _ in refused} == {"ServiceUnavailableError"}
    rendering = statistics.median(seconds for response, seconds in answers if response.status_code == 200)
    print(
        f"served {len(served)} in {rendering:.2f} s; "
        f"refused {len(refused)} of {len(answers)}, in {statistics.median(s for _, s in refused):.2f} s; "
        f"{len(refusals)} small ones in {statistics.median(refusals):.3f} s; "
        f"generation {statistics.median(alone):.2f} s alone, {statistics.median(beside):.2f} s beside the flood"
    )
    assert len(refusals) > 8
    assert statistics.median(refusals) < statistics.median(beside), "a refusal waits for nothing"
    # One core for rendering, one for all else: the flood may cost its share of the machine, never a place in a queue.
    assert statistics.median(beside) < rendering, "no generation waits for a render-only request"


def test_routers_share_a_tiers_limit_and_together_never_admit_more(app: Deployed) -> None:
    with ExitStack() as stack:
        for routers in (2, 3):
            app.update(ARGS, **{**dict.fromkeys(TIERS, ONE), "Router": {**ONE, "num_replicas": routers}})
            app.wait_for_replicas(Router=routers)
            _wait_for_routers(app, routers)
            held = stack.enter_context(ExitStack())
            asked = [held.enter_context(_asked(app.url, RENDER, 99)) for _ in range(12 * RENDERS)]
            _wait_for_refusals(asked, len(asked) - RENDERS)
            assert _under_way(app) == RENDERS
            held.close()
            wait_until(lambda: _under_way(app) == 0, 30, "places are given back")
        app.update(ARGS, **dict.fromkeys(TIERS, ONE))
        app.wait_for_replicas(Router=1)


def test_bytes_of_media_beyond_a_tiers_limit_are_refused_before_they_are_sent(app: Deployed) -> None:
    def admitted(number: int) -> bool:
        return _under_way(app, "generation_requests") == number

    with _asked(app.url, CHAT, MEDIA_BYTES * 3 // 4):
        wait_until(lambda: admitted(1), 30, "there is room for the first")
        with _asked(app.url, CHAT, MEDIA_BYTES // 2) as second, _asked(app.url, CHAT, MEDIA_BYTES // 8):
            (refusal,) = _wait_for_refusals([second], 1)
            assert b"bytes of media are under way" in refusal
            wait_until(lambda: admitted(2), 30, "there is room for the small one")
    wait_until(lambda: _under_way(app, "generation_media_bytes") == 0, 30, "bytes are given back")


def _wait_for_routers(app: Deployed, number: int) -> None:
    wait_until(lambda: len(app.tiers()["router"]) == number, 30, "routers know of each other")


def _under_way(app: Deployed, what: str = "render_requests") -> float:
    return sum(report.under_way[what] for report in app.tiers()["router"])


@contextmanager
def _asked(url: str, path: str, length: int) -> Iterator[socket.socket]:
    """The connection of a request that announces a body and sends its first byte: it keeps a place if it gets one."""
    address = httpx.URL(url)
    lines = (f"POST {address.path}{path} HTTP/1.1", "Host: a", f"Content-Length: {length}")
    head = "\r\n".join((*lines, "Content-Type: application/json", "", "{"))
    with socket.create_connection((address.host, address.port or 80)) as connection:
        connection.sendall(head.encode())
        yield connection


def _wait_for_refusals(asked: Sequence[socket.socket], number: int) -> list[bytes]:
    """The answers of those that are refused, once there are so many."""

    def answered() -> list[socket.socket]:
        return select.select(asked, [], [], 0)[0]

    wait_until(lambda: len(answered()) >= number, 60, f"{number} refusals")
    refusals = [_read(connection) for connection in answered()]
    assert len(refusals) == number
    assert all(refusal.startswith(b"HTTP/1.1 503 ") for refusal in refusals), refusals
    return refusals


def _read(connection: socket.socket) -> bytes:
    """An answer with a JSON body."""
    connection.settimeout(30)
    answer = b""
    while b"}" not in answer:
        answer += connection.recv(4096)
    return answer


async def _generate(http: httpx.AsyncClient) -> float:
    """Seconds of a short answer about a picture."""
    begun = time.monotonic()
    body = {"messages": about(picture(3)), "temperature": 0, "max_tokens": 8}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return time.monotonic() - begun


async def _refusal(http: httpx.AsyncClient) -> float | None:
    """Seconds in which a small render-only request is refused; None where it finds a place."""
    begun = time.monotonic()
    response = await http.post(RENDER, json={"messages": [{"role": "user", "content": "Hello"}]})
    return time.monotonic() - begun if response.status_code == 503 else None


async def _flood(http: httpx.AsyncClient, body: bytes, over: asyncio.Event) -> list[tuple[httpx.Response, float]]:
    """Ask for rendering until it is over; a refused client comes back sooner than it was told to."""
    answers = []
    while not over.is_set():
        begun = time.monotonic()
        response = await http.post(RENDER, content=body, headers={"Content-Type": "application/json"})
        answers.append((response, time.monotonic() - begun))
        if response.status_code == 503:
            await asyncio.sleep(0.3)
    return answers

"""The failure rules, one by one, each with a real fault: what dies under a request, and what its client sees."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from deployments.calls import ReplicaReport
from engine.protocol import EngineStats
from tests.faults.cluster import START_S, Deployed, controller_pid, core_of, kill
from tests.faults.traffic import STORY, Ask, Outcome, Traffic, ask_patiently, client, known_answers, mixed_asks, slow
from tests.stack.helpers import about, picture, streams_with_a_death, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S)]


@pytest.fixture(scope="module")
def asks(shared: Deployed) -> list[tuple[Ask, str]]:
    """Requests of every kind and their right answers."""
    asks = mixed_asks(random.Random(4), 32)
    return list(zip(asks, known_answers(shared.url, asks), strict=True))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def test_a_request_whose_render_replica_is_killed_in_the_middle_of_it_is_rendered_by_another(
    app: Deployed, pool: ThreadPoolExecutor
) -> None:
    outcome, victim = killed_at_work(app, pool, slow("render", 0), "render", "render")
    assert (outcome.failure, outcome.broken) == (None, ())
    assert outcome.answer is not None
    assert outcome.answer.replica != victim
    again = once(app, slow("render", 0))
    assert again.answer is not None
    assert outcome.answer.content == again.answer.content


def test_a_request_whose_engine_replica_is_killed_before_the_first_token_is_served_by_another(
    app: Deployed, pool: ThreadPoolExecutor
) -> None:
    ask = slow("chat", 1, temperature=0, max_tokens=8)
    outcome, victim = killed_at_work(app, pool, ask, "engine", "generate")
    assert (outcome.failure, outcome.broken) == (None, ())
    assert outcome.answer is not None
    assert outcome.answer.replica != victim
    again = once(app, ask)
    assert again.answer is not None
    assert outcome.answer.content == again.answer.content


@pytest.mark.parametrize("what", ["replica", "core"])
def test_streams_of_an_engine_that_hangs_go_on_elsewhere(app: Deployed, what: str) -> None:
    """It lives and does nothing: its connections stay open, and nobody is told."""
    messages = about(picture(20 + len(what)), text=STORY)
    body = {"messages": messages, "temperature": 0, "ignore_eos": True, "max_tokens": 400}
    undisturbed = app.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    pids = {replica.name: replica for replica in app.replicas("EngineReplica")}

    def hang() -> None:
        reports = app.tiers()["engine"]
        (busy,) = [report.replica for report in reports if report.engine is not None and report.engine.running]
        (psutil.Process(pids[busy].pid) if what == "replica" else core_of(pids[busy])).suspend()

    begun = time.monotonic()
    assert asyncio.run(streams_with_a_death(app, body, hang)) == [undisturbed] * 4
    print(f"the streams of a {what} that hung were through after {time.monotonic() - begun:.0f} s")


def test_a_request_whose_render_replica_hangs_is_rendered_by_another(app: Deployed, pool: ThreadPoolExecutor) -> None:
    outcome, victim = killed_at_work(app, pool, slow("render", 3), "render", "render", hang)
    assert (outcome.failure, outcome.broken) == (None, ())
    assert outcome.answer is not None
    assert outcome.answer.replica != victim


def hang(pid: int) -> None:
    psutil.Process(pid).suspend()


def test_what_a_killed_router_was_forwarding_succeeds_when_asked_again_and_nothing_else_breaks(
    app: Deployed, asks: list[tuple[Ask, str]]
) -> None:
    victim = app.replicas("Router")[0]
    with Traffic(app.url, asks, clients=8) as traffic:
        traffic.wait_for(30)
        kill(victim.pid)
        killed_at = time.time()
        traffic.wait_for(60)
        app.wait_for_replicas(Router=2)
    assert traffic.failures == []
    assert all(each.begun < killed_at for each in traffic.outcomes if each.broken), (
        "the other router takes what comes after"
    )


def test_clients_that_ask_again_get_through_as_soon_as_a_lone_proxy_is_back(
    app: Deployed, asks: list[tuple[Ask, str]]
) -> None:
    victim = app.cluster.proxy_pid()
    with Traffic(app.url, asks, clients=8) as traffic:
        traffic.wait_for(30)
        kill(victim)
        wait_until(lambda: any(each.broken for each in traffic.outcomes), 120, "what was cut off has been answered")
        traffic.wait_for(30)
    assert traffic.failures == []


def test_no_request_notices_that_serves_controller_is_killed(app: Deployed, asks: list[tuple[Ask, str]]) -> None:
    victim = controller_pid()
    with Traffic(app.url, asks, clients=8) as traffic:
        traffic.wait_for(30)
        kill(victim)
        wait_until(lambda: controller_pid() != victim, 120, "another controller runs")
        traffic.wait_for(60)
    assert (traffic.failures, traffic.broken) == ([], [])


def test_no_request_notices_that_the_head_is_without_its_state_for_a_while(
    app: Deployed, asks: list[tuple[Ask, str]]
) -> None:
    head = app.cluster.nodes.head_node
    with Traffic(app.url, asks, clients=8) as traffic:
        traffic.wait_for(30)
        head.kill_gcs_server()
        traffic.wait_for(60)
        head.start_gcs_server()
        traffic.wait_for(60)
    assert (traffic.failures, traffic.broken) == ([], [])
    wait_until(lambda: controller_pid() > 0, 120, "the controller answers")


def test_a_cache_that_a_replica_did_not_clear_is_said_to_be_left(app: Deployed) -> None:
    stopped = psutil.Process(app.replicas("RenderReplica")[0].pid)
    stopped.suspend()
    try:
        left = app.post("/v1/clear_mm_cache", {})
    finally:
        stopped.resume()
    assert left.status_code == 503, left.text
    assert "3 of 4 replicas have cleared" in left.json()["error"]["message"]
    app.clear()


def test_the_work_of_many_clients_that_leave_in_mid_stream_stops_within_a_second(app: Deployed) -> None:
    before = sum(engine.aborted for engine in engines(app))

    async def leave_together() -> float:
        """Begin 16 endless streams, and go when all have begun; the moment of it."""
        body = {"max_tokens": 3000, "ignore_eos": True, "stream": True}
        begun, over = asyncio.Barrier(17), asyncio.Event()

        async def one(http: httpx.AsyncClient, number: int) -> None:
            messages = about(picture(number))
            async with http.stream("POST", "/v1/chat/completions", json={"messages": messages, **body}) as response:
                assert response.status_code == 200
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith("data: {")
                await begun.wait()
                await over.wait()

        async with client(app.url) as http, asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(one(http, number))
            await begun.wait()
            reports = (await asyncio.to_thread(app.tiers))["engine"]
            # On a machine under load the first ones may have come to the end of the context.
            assert sum(report.engine.running for report in reports if report.engine is not None) > 1, reports
            over.set()
        return time.monotonic()

    left_at = asyncio.run(leave_together())
    wait_until(lambda: all(engine.running + engine.waiting == 0 for engine in engines(app)), 1, "the engines are idle")
    assert time.monotonic() - left_at < 1
    assert before < sum(engine.aborted for engine in engines(app)) <= before + 16
    wait_until(lambda: all(each.caches["sender"].pinned == 0 for each in app.tiers()["engine"]), 1, "nothing is pinned")


def test_rendering_for_a_client_that_has_left_stops_within_a_second(app: Deployed) -> None:
    ask = slow("render", 2)
    with pytest.raises(httpx.ReadTimeout):
        app.http.post(ask.path, json=ask.body, timeout=httpx.Timeout(60, read=0.7))
    left_at = time.monotonic()
    replicas = [psutil.Process(replica.pid) for replica in app.replicas("RenderReplica")]
    wait_until(lambda: time.monotonic() - left_at > 1, 2, "a second has passed")
    before = sum(sum(replica.cpu_times()[:2]) for replica in replicas)
    wait_until(lambda: time.monotonic() - left_at > 2, 2, "another has passed")
    assert sum(sum(replica.cpu_times()[:2]) for replica in replicas) - before < 0.3, "seconds of CPU in a second"


def test_a_media_host_that_stalls_costs_its_own_requests_an_error_that_names_the_image_and_no_other_request_anything(
    app: Deployed, asks: list[tuple[Ask, str]], pool: ThreadPoolExecutor
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as host:  # the kernel connects, nobody ever answers
        url = f"http://127.0.0.1:{host.getsockname()[1]}/picture.png"
        (message,) = about(picture(0))
        message["content"].insert(1, {"type": "image_url", "image_url": {"url": url}})
        body = {"messages": [message]}
        with Traffic(app.url, asks) as traffic:
            traffic.wait_for(8)
            paths = ["/v1/chat/completions", "/v1/chat/completions/render"] * 8
            responses = list(pool.map(lambda path: app.post(path, body), paths))
            traffic.wait_for(8)
    assert (traffic.failures, traffic.broken) == ([], [])
    for response in responses:
        assert response.status_code == 422, response.text
        error = response.json()["error"]
        assert error["type"] == "UnprocessableEntityError"
        assert "image 1" in error["message"]


def killed_at_work(
    app: Deployed, pool: ThreadPoolExecutor, ask: Ask, tier: str, operation: str, end: Callable[[int], None] = kill
) -> tuple[Outcome, str]:
    """End the replica that a request has reached, before it has answered; the request's outcome, and the replica."""
    before = {report.replica: report.requests.get(operation, 0) for report in app.tiers()[tier]}
    future = pool.submit(once, app, ask)
    reached: list[ReplicaReport] = []

    def has_reached() -> bool:
        assert not future.done(), future.result().failure
        reports = app.tiers()[tier]
        reached[:] = [each for each in reports if each.requests.get(operation, 0) > before.get(each.replica, 0)]
        return bool(reached)

    wait_until(has_reached, 60, "the request has reached a replica")
    end(reached[0].pid)
    assert not future.done()
    return future.result(), reached[0].replica


def once(app: Deployed, ask: Ask) -> Outcome:
    async def run() -> Outcome:
        async with client(app.url) as http:
            return await ask_patiently(http, ask)

    return asyncio.run(run())


def engines(app: Deployed) -> list[EngineStats]:
    return [report.engine for report in app.tiers()["engine"] if report.engine is not None]

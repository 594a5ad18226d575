"""The commands that operators start, for real: the high-throughput ingress, keys, a Prometheus, the end of it all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.config import PROJECT
from tests.stack.helpers import about, picture, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

KEY = "a-key-of-the-test"
KEYED = {"Authorization": f"Bearer {KEY}"}
START_S = 900  # what a machine under load takes
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
LINE = re.compile(r"^(?!#).+", re.MULTILINE)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass(frozen=True)
class Launched:
    """A running `python -m deployments.launch`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def tree(self) -> list[psutil.Process]:
        """Every process of it, haproxy and Ray's own among them."""
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def haproxy(self) -> list[psutil.Process]:
        """Of this launch: its configuration is in the launch's own folder."""
        variables = (variable for child in self.tree() for variable in child.environ().items())
        folder = next(str(Path(value).parent) for name, value in variables if name.endswith("HAPROXY_CONFIG_FILE_LOC"))
        return [
            process
            for process in psutil.process_iter(["name", "cmdline"])
            if process.info["name"] == "haproxy" and any(folder in part for part in process.info["cmdline"] or [])
        ]

    def healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def launched(*arguments: str, environ: Mapping[str, str] | None = None) -> Iterator[Launched]:
    """The launcher with ports of its own, healthy; interrupted as Ctrl-C would at the end."""
    http, stats, metrics, fallback = free_ports(4)
    ports = {
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "36000",
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "36100",
        "RAY_worker_niceness": "0",  # Ray's 15 would starve beside whatever else runs here
    }
    command = [sys.executable, "-m", "deployments.launch", "--port", str(http), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as file:
            environment = {**os.environ, **ports, "GREENROOM_API_KEYS": KEY, **(environ or {})}
            process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=file, stderr=file)
        app = Launched(process, f"http://127.0.0.1:{http}", log)
        try:
            wait_until(app.healthy, START_S, "the application is healthy")
            yield app
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(90)


@pytest.fixture(scope="module")
def fast() -> Iterator[Launched]:
    """Both applications behind the high-throughput ingress, with an API key."""
    with launched("--config", "docs/examples/both.yaml", "--ingress", "haproxy") as app:
        yield app


@pytest.mark.parametrize("prefix", ["", "/render"])
def test_both_applications_ask_for_the_key_everywhere_but_at_health(fast: Launched, prefix: str) -> None:
    body = {"prompt": "a"}
    for headers, status in ((KEYED, 200), ({}, 401), ({"Authorization": "Bearer wrong"}, 401)):
        response = httpx.post(f"{fast.url}{prefix}/tokenize", json=body, headers=headers, timeout=60)
        assert response.status_code == status
        assert response.headers["x-greenroom-tier"]
        assert response.headers["x-request-id"]
    health = httpx.get(f"{fast.url}{prefix}/health", timeout=30)
    assert health.status_code == 200
    assert KEY not in health.text


def test_a_stream_comes_through_the_high_throughput_ingress(fast: Launched) -> None:
    headers = {**KEYED, "X-Request-ID": "mine"}
    with httpx.stream(
        "POST", f"{fast.url}/v1/chat/completions", json={**HELLO, "stream": True}, headers=headers, timeout=60
    ) as response:
        events = [line for line in response.iter_lines() if line]
    assert response.headers["x-request-id"] == "mine"
    assert len(events) == 5
    assert events[-1] == "data: [DONE]"


def test_a_render_tier_of_no_replicas_is_stood_in_for_and_then_starts(fast: Launched) -> None:
    def tier() -> str:
        body = {"messages": about(picture(0))}
        response = httpx.post(f"{fast.url}/v1/chat/completions/render", json=body, headers=KEYED, timeout=60)
        assert response.status_code == 200
        return response.headers["x-greenroom-tier"]

    wait_until(lambda: tier() == "render", 120, "a render replica serves")


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_beyond_the_limit_is_a_413_through_the_ingress(fast: Launched, announced: bool) -> None:
    mebibyte = b" " * 2**20
    content = mebibyte * 257 if announced else (mebibyte for _ in range(257))
    response = httpx.post(
        f"{fast.url}/tokenize", content=content, headers={**KEYED, "Content-Type": "application/json"}, timeout=60
    )
    assert (response.status_code, response.json()["error"]["code"]) == (413, 413)


def test_a_prometheus_scrapes_it_and_answers_every_query_of_the_docs(fast: Launched, tmp_path: Path) -> None:
    binary = shutil.which("prometheus")
    assert binary is not None, "this test needs Prometheus: apt-get install --no-install-recommends prometheus"
    (port,) = free_ports(1)
    configuration = (PROJECT / "docs/cluster/prometheus.yaml").read_text()
    session = next(
        part.partition("=")[2] for child in fast.tree() for part in child.cmdline() if part.startswith("--session-dir=")
    )
    (exported,) = Path(session).glob("metrics_export_port_*")
    targets = tmp_path / "targets.json"
    targets.write_text(json.dumps([{"targets": [f"127.0.0.1:{exported.read_text()}"]}]))
    configuration = configuration.replace("/tmp/ray/prom_metrics_service_discovery.json", str(targets))
    (tmp_path / "prometheus.yaml").write_text(configuration.replace("15s", "1s"))
    shutil.copy(PROJECT / "docs/cluster/alerts.yaml", tmp_path)
    command = [binary, f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)

    def query(text: str) -> list[Any]:
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": text}, timeout=10)
        assert answer.status_code == 200, answer.text
        result: list[Any] = answer.json()["data"]["result"]
        return result

    def answers(text: str) -> bool:
        httpx.post(f"{fast.url}/v1/chat/completions", json=HELLO, headers=KEYED, timeout=60)
        time.sleep(1)
        return bool(query(text))

    try:
        with httpx.Client() as client:
            wait_until(lambda: _up(client, port), 30, "Prometheus answers")
        counted = 'sum(rate(ray_greenroom_requests_total{operation="chat_completions", status="200"}[1m])) > 0'
        wait_until(lambda: answers(counted), 120, "requests are counted")
        blocks = re.findall(r"```promql\n(.*?)```", (PROJECT / "docs/operations.md").read_text(), re.DOTALL)
        queries = [line for block in blocks for line in LINE.findall(block)]
        assert len(queries) > 10
        silent = [text for text in queries if not query(text.replace("[5m]", "[1m]"))]
        assert not silent
        told = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules", timeout=10).json()["data"]["groups"]
        rules = [rule for group in told for rule in group["rules"]]
        assert len(rules) > 5
        assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
        assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
    finally:
        process.terminate()
        process.wait(30)


def _up(client: httpx.Client, port: int) -> bool:
    try:
        return client.get(f"http://127.0.0.1:{port}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_an_interrupt_ends_everything_that_was_started() -> None:
    with launched("--config", "docs/examples/render.yaml", "--ingress", "haproxy") as app:
        processes = [*app.tree(), *app.haproxy()]
        assert app.haproxy()
    assert _gone(processes) == []


def test_a_killed_serve_leaves_no_haproxy_behind() -> None:
    with launched("--config", "docs/examples/render.yaml", "--ingress", "haproxy") as app:
        haproxy = app.haproxy()
        assert haproxy
        (child,) = psutil.Process(app.process.pid).children()
        child.kill()
        assert app.process.wait(60) != 0
        assert _gone(haproxy) == []


def _gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    return list(psutil.wait_procs(processes, timeout=60)[1])

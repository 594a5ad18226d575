import stat
from pathlib import Path

import pytest
import yaml

from deployments.launch import SERVE_CONFIG, ensure_token, load_config, ray_environment
from renderer.errors import ConfigError


def write(tmp_path: Path, config: object) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def minimal(**deployment: object) -> dict[str, object]:
    application: dict[str, object] = {"name": "a", "import_path": "deployments.app:build", "args": {"model": "m"}}
    if deployment:
        application["deployments"] = [{"name": "Router", **deployment}]
    return {"applications": [application]}


def test_the_shipped_config_file_is_valid() -> None:
    assert load_config(SERVE_CONFIG, None, None)["http_options"]["host"] == "127.0.0.1"


def test_the_command_line_overrides_model_and_port(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, minimal()), "other", 8123)
    assert config["applications"][0]["args"]["model"] == "other"
    assert config["http_options"]["port"] == 8123


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**minimal(), "application": []}, "application"),
        (minimal(num_replica=1), "num_replica"),
        (minimal(autoscaling_config={"max_replica": 2}), "max_replica"),
        ({"applications": [{"import_path": "deployments.app:build", "args": {"modle": "m"}}]}, "modle"),
    ],
)
def test_a_key_that_serve_would_ignore_is_refused_by_name(
    tmp_path: Path, config: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(write(tmp_path, config), None, None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml", None, None)


def test_ray_gets_token_authentication_and_loopback_unless_the_caller_says_otherwise() -> None:
    environment = ray_environment({})
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert ray_environment({"RAY_AUTH_MODE": "disabled"})["RAY_AUTH_MODE"] == "disabled"


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

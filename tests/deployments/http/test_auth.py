import hashlib
import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.config import GreenroomConfig
from deployments.http.auth import KeyRing
from renderer.errors import AuthenticationError, ConfigError


def accepts(ring: KeyRing, header: str | None) -> bool:
    try:
        ring.check(header)
    except AuthenticationError:
        return False
    return True


def test_keys_come_from_variables_files_and_digests(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("in-a-file\nanother\n")
    digest = hashlib.sha256(b"hashed").hexdigest()
    ring = KeyRing(["env:KEYS", f"file:{path}", f"sha256:{digest}"], {"KEYS": "first, second"})
    for key in ("first", "second", "in-a-file", "another", "hashed"):
        assert accepts(ring, f"Bearer {key}"), key
    for key in ("third", "first,", digest, "FIRST", "first second"):
        assert not accepts(ring, f"Bearer {key}"), key


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic first", "first"])
def test_a_request_without_a_bearer_key_is_refused(header: str | None) -> None:
    assert not accepts(KeyRing(["env:KEYS"], {"KEYS": "first"}), header)


def test_the_scheme_is_read_in_any_case() -> None:
    assert accepts(KeyRing(["env:KEYS"], {"KEYS": "first"}), "bearer first")


@pytest.mark.parametrize(("source", "named"), [("env:KEYS", "KEYS"), ("file:/nowhere/keys", "/nowhere/keys")])
def test_a_source_without_a_key_is_an_error_at_start(source: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        KeyRing([source], {})


def test_a_changed_file_counts_without_a_restart_and_a_lost_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, now = tmp_path / "keys", [0.0]
    path.write_text("old")
    ring = KeyRing([f"file:{path}"], {}, lambda: now[0])
    new = tmp_path / "new"
    new.write_text("young")
    new.replace(path)
    assert accepts(ring, "Bearer old")
    now[0] = 5.0
    assert accepts(ring, "Bearer young")
    assert not accepts(ring, "Bearer old")
    path.unlink()
    now[0] = 10.0
    assert accepts(ring, "Bearer young")
    path.write_text("")
    now[0] = 15.0
    with caplog.at_level(logging.WARNING):
        assert accepts(ring, "Bearer young")
    assert "holds no key" in caplog.text


@pytest.mark.parametrize("source", ["sk-secret", "sha256:sk-secret", "env:", "env:sk-secret"])
def test_a_key_in_the_configuration_is_refused_and_not_repeated(source: str) -> None:
    with pytest.raises(ValidationError, match="api_keys") as caught:
        GreenroomConfig.model_validate({"model": "demo/model", "router": {"api_keys": [source]}})
    assert "sk-secret" not in str(caught.value)

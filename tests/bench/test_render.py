"""`bench.render` on the demo model, as `make bench-render ARGS=--quick` runs it."""

import json
from pathlib import Path

import pytest

from bench import render
from bench.verdicts import BUDGETS


def test_the_quick_bench_prints_and_writes_every_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    monkeypatch.setattr("sys.argv", ["bench.render", "--quick", "--json", str(report)])
    render.main()
    output = capsys.readouterr().out
    written = json.loads(report.read_text())
    tables = written["tables"]
    assert [row["request"] for row in tables["overhead"]] == ["text", "640x480"]
    assert all(row["cpu"] > 0 and row["pil cpu"] > 0 for row in tables["overhead"])
    assert [row["what"] for row in tables["shortcuts"]] == ["layout", "cache hit"]
    assert [row["image"] for row in tables["pixel path"]] == ["640x480", "1280x720", "1920x1080"]
    for row in tables["pixel path"]:
        steps = [row[step] for step in ("resize", "copy", "normalise", "patch", "rest")]
        assert all(row[stage] > 0 for stage in ("header", "decode", "tensors", "encode", "base64"))
        assert min(steps) >= 0 < sum(steps[:-1])
    assert {row["start"] for row in tables["warm-up"]} == {"warm", "cold"}
    assert [row["budget"] for row in tables["verdicts"]] == list(BUDGETS)
    assert all(name in output for name in BUDGETS)
    assert written["machine"]["cores"] >= 1

"""`bench.render` on the demo model, as `make bench-render ARGS=--quick` runs it."""

import json
import subprocess
import sys
from pathlib import Path

from bench.verdicts import BUDGETS


def test_the_quick_bench_prints_and_writes_every_table(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "bench.render", "--quick", "--json", str(report)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    written = json.loads(report.read_text())
    tables = written["tables"]
    assert [row["request"] for row in tables["overhead"]] == ["text", "640x480"]
    assert all(row["cpu"] > 0 and row["pil cpu"] > 0 for row in tables["overhead"])
    assert [row["what"] for row in tables["shortcuts"]] == ["layout", "cache hit"]
    assert [row["image"] for row in tables["pixel path"]] == ["640x480", "1280x720", "1920x1080"]
    assert {row["start"] for row in tables["warm-up"]} == {"warm", "cold"}
    assert [row["budget"] for row in tables["verdicts"]] == list(BUDGETS)
    assert all(name in output for name in BUDGETS)
    assert written["machine"]["cores"] >= 1

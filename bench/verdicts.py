"""What the tables of `bench.render` say of the budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
# The most that a figure may be; `times` figures are the least.
BUDGETS = {
    "caching off / bare processor": 1.1,
    "layout, times": 25.0,
    "cache hit, times": 20.0,
    "640x480 JPEG to tensors, ms": 3.0,
    "1920x1080 JPEG to tensors, ms": 25.0,
    "first after warm-up / steady": 1.2,
}


def verdicts(tables: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """The worst figure of a model for each budget. The budgets in milliseconds were made for Qwen's way of patches."""
    figures = {
        "caching off / bare processor": max(_by_prefix(tables["overhead"], "/ ")),
        "layout, times": min(_by_suffix(tables["shortcuts"], "layout")),
        "cache hit, times": min(_by_suffix(tables["shortcuts"], "cache hit")),
        "640x480 JPEG to tensors, ms": _stage(tables["pixel path"], "640x480"),
        "1920x1080 JPEG to tensors, ms": _stage(tables["pixel path"], "1920x1080"),
        "first after warm-up / steady": max(
            float(row["ratio"]) for row in tables["warm-up"] if row["start"] == "warm" and row["what"] != "text"
        ),
    }
    return [
        {"budget": name, "at": figure, "allowed": BUDGETS[name], "held": _held(name, figure)}
        for name, figure in figures.items()
    ]


def _held(name: str, figure: float) -> str:
    held = figure >= BUDGETS[name] if name.endswith("times") else figure <= BUDGETS[name]
    return "yes" if held else "no"


def _by_prefix(rows: Rows, prefix: str) -> list[float]:
    return [float(value) for row in rows for name, value in row.items() if name.startswith(prefix)]


def _by_suffix(rows: Rows, what: str) -> list[float]:
    return [float(v) for row in rows if row["what"] == what for name, v in row.items() if name.endswith(" times")]


def _stage(rows: Rows, image: str) -> float:
    return next(float(row["JPEG to tensors"]) for row in rows if row["image"] == image)

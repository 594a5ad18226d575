"""Timing by turns, so that other load on the machine hits all alike; tables, and the machine that they are of."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Tables keep their columns when the output is no terminal.
console = Console(width=None if Console().is_terminal else 150)


@dataclass(frozen=True, slots=True)
class Spent:
    """Milliseconds that something took: of the processor, all threads together, and by the clock."""

    cpu_ms: float
    wall_ms: float


Timed = Callable[[], Spent]


def timed(fn: Callable[[], object]) -> Timed:
    """`fn` in this process, timed: of the processor's time that of all threads counts."""

    def run() -> Spent:
        wall, cpu = time.perf_counter(), time.process_time()
        fn()
        return Spent((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)

    return run


def thread_ms(fn: Callable[[], object]) -> Callable[[], float]:
    """`fn`, timed in whichever thread runs it: milliseconds of that thread's own time on the processor."""

    def run() -> float:
        begun = time.thread_time()
        fn()
        return (time.thread_time() - begun) * 1e3

    return run


def by_turns(contenders: Mapping[str, Timed], rounds: int) -> dict[str, Spent]:
    """Medians of so many rounds, in each of which every contender has one turn; two rounds before them do not count."""
    samples: dict[str, list[Spent]] = {name: [] for name in contenders}
    for turn in range(-2, rounds):
        for name, contender in contenders.items():
            spent = contender()
            if turn >= 0:
                samples[name].append(spent)
    return {name: median(taken) for name, taken in samples.items()}


def median(taken: Sequence[Spent]) -> Spent:
    return Spent(statistics.median(one.cpu_ms for one in taken), statistics.median(one.wall_ms for one in taken))


def machine() -> dict[str, Any]:
    """What the figures are of."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "at": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def show(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows of the same keys as a table: numbers to the right, three figures of each."""
    console.print(f"\n[bold]{title}")
    table = Table()
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row.values()))
    console.print(table)


def cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def save(path: Path, report: Mapping[str, object]) -> None:
    """Write a report as JSON; dataclasses become objects."""
    path.write_text(json.dumps(report, indent=1, default=asdict) + "\n")
    console.print(f"Written to {path}")

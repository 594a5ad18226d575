"""Mixed requests under faults, and what is expected then: every answer right, nothing grown, nothing left over."""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.faults.cluster import Deployed
from tests.faults.traffic import Outcome, Traffic, known_answers, mixed_asks
from tests.soak.faults import Faults
from tests.soak.processes import Census, Life
from tests.stack.helpers import wait_until

# The engines, and what was killed, have so long to come to rest when the last request has ended.
REST_S = 30.0


@dataclass(frozen=True)
class Plan:
    requests: int = 10_000
    every_s: float = 20.0
    clients: int = 8
    different: int = 96
    seed: int = 0


@dataclass(frozen=True)
class Result:
    outcomes: list[Outcome]
    faults: Mapping[str, int]
    census: Census
    left_over: list[Life]
    seconds: float

    @property
    def problems(self) -> list[str]:
        """Everything that should not have happened."""
        failed = [f"{each.ask.kind}: {each.failure}" for each in self.outcomes if each.failure is not None]
        grown = [f"{life.role} {life.pid} grew: {_grown(life)}" for life in self.census.lives.values() if life.grew]
        left = [f"left over: {life.role} {life.pid}" for life in self.left_over]
        return failed + grown + left


def soak(
    app: Deployed,
    args: Mapping[str, Any],
    deployments: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    console: Console,
) -> Result:
    """Serve the plan's requests, with a fault at every turn; returns when the application has come to rest."""
    asks = mixed_asks(random.Random(plan.seed), plan.different)
    known = list(zip(asks, known_answers(app.url, asks), strict=True))
    faults, census, begun = Faults(app, args, deployments, plan.seed), Census(), time.monotonic()
    with census.taken(), Traffic(app.url, known, plan.clients, plan.requests, plan.seed) as traffic:
        _disturb(traffic, faults, plan, console)
    seconds = time.monotonic() - begun
    faults.restore()
    wait_until(lambda: _rests(app), REST_S, "the engines have nothing to do and hold nothing")
    wait_until(lambda: not census.left_over(), REST_S, f"nobody is left over: {census.left_over()}")
    return Result(traffic.outcomes, faults.counts, census, census.left_over(), seconds)


def show(result: Result, console: Console) -> None:
    """Tables of requests, faults and processes."""
    console.print(_requests_table(result.outcomes))
    table = Table("fault", "times", title=f"{sum(result.faults.values())} faults in {result.seconds:.0f} s")
    for name, times in sorted(result.faults.items()):
        table.add_row(name, str(times))
    console.print(table)
    console.print(_process_table(result.census))
    for problem in result.problems:
        console.print(f"[red]{problem}[/red]")


def _disturb(traffic: Traffic, faults: Faults, plan: Plan, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("requests", total=plan.requests)
        due = time.monotonic() + plan.every_s
        while not traffic.ended:
            if time.monotonic() >= due:
                due += plan.every_s
                progress.console.print(f"{time.strftime('%H:%M:%S')} {faults.next()}")
            time.sleep(0.2)
            failed = len(traffic.failures)
            progress.update(task, completed=len(traffic.outcomes), description=f"requests, {failed} failed")


def _rests(app: Deployed) -> bool:
    reports = app.tiers()["engine"]
    idle = all(report.engine is not None and report.engine.running + report.engine.waiting == 0 for report in reports)
    return idle and all(report.caches["sender"].pinned == 0 for report in reports)


def _requests_table(outcomes: list[Outcome]) -> Table:
    table = Table(
        "request", "answered", "asked again", "failed", "median s", "p99 s", title=f"{len(outcomes)} requests"
    )
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.ask.kind].append(outcome)
    for kind, each in sorted(kinds.items()):
        seconds = sorted(outcome.seconds for outcome in each)
        right = sum(outcome.failure is None for outcome in each)
        again = sum(bool(outcome.broken) for outcome in each)
        median, late = seconds[len(seconds) // 2], seconds[len(seconds) * 99 // 100]
        table.add_row(kind, str(right), str(again), str(len(each) - right), f"{median:.2f}", f"{late:.2f}")
    return table


def _process_table(census: Census) -> Table:
    table = Table("process", "lived", "median MB", "most MB", "growth when settled", title="memory (PSS)")
    for role, lives in census.by_role().items():
        samples = [pss for life in lives for _, pss in life.samples]
        if samples:
            told = [life for life in lives if life.quarters is not None]
            growth = ", ".join(_grown(life) for life in told) or "lived too short to tell"
            median = statistics.median(samples) / 2**20
            table.add_row(role, str(len(lives)), f"{median:.0f}", f"{max(samples) / 2**20:.0f}", growth)
    return table


def _grown(life: Life) -> str:
    first, last = life.quarters or (0.0, 0.0)
    return f"{first / 2**20:.0f} -> {last / 2**20:.0f} MB"

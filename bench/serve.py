"""Greenroom and vLLM's render server on the same cores, the same model and the same load, by turns.

    python -m bench.serve --peer VENV [--quick] [--model MODEL] [--renders 1] [--engine] [--json FILE]

Measured are the render application (`direct`), the application with a router (`router`), both over HTTP as JSON and as
MessagePack and over a handle, and the peer. Processor time is that of the whole process tree of a server, Ray's own
processes included. The servers run side by side, and only one at a time has load.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from bench import load
from bench.bodies import CASES, Case
from bench.cold import cold_start
from bench.handle import Caller
from bench.load import Sample, merged
from bench.measure import console, machine, save, show
from bench.render import folder_of
from bench.servers import Greenroom, Peer, Server

JSON, MSGPACK = "application/json", "application/msgpack"
PEER = "vLLM"
Rows = list[dict[str, Any]]
Target = Callable[[Case, int, float], Sample]


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: seconds of a load, how often each has its turn, and how many starts the cold table is of."""

    model: Path
    peer: Path | None
    renders: int
    engine: bool
    cases: Sequence[Case]
    concurrency: Sequence[int]
    seconds: float
    rounds: int
    starts: int


@contextmanager
def running(options: Options) -> Iterator[tuple[dict[str, Target], Rows]]:
    """Every way to ask for a rendering, by name, while the servers run; and how they behaved when they were fresh."""
    rows: Rows = []
    with ExitStack() as stack:
        targets: dict[str, Target] = {}
        greenroom = Greenroom(options.model, options.renders, options.engine)
        stack.enter_context(greenroom)
        for name, path in (("direct", "/direct"), ("router", "")):
            rows += cold_start(name, greenroom.url + path)
            targets[f"{name}, JSON"] = over_http(greenroom, path, JSON)
            targets[f"{name}, msgpack"] = over_http(greenroom, path, MSGPACK)
        for name, application in (("direct", "direct"), ("router", "whole")):
            caller = Caller(greenroom.environment, greenroom.ray_address, application, greenroom.pid)
            targets[f"{name}, handle"] = over_handle(stack.enter_context(caller))
        if options.peer is not None:
            peer = stack.enter_context(Peer(options.peer, options.model))
            rows += cold_start(PEER, peer.url)
            targets[PEER] = over_http(peer, "", JSON)
        yield targets, rows


def over_http(server: Server, path: str, accept: str) -> Target:
    def run(case: Case, concurrency: int, seconds: float) -> Sample:
        return load.run(server.url + path, server.pid, case.bodies(), concurrency, seconds, accept)

    return run


def over_handle(caller: Caller) -> Target:
    return lambda case, concurrency, seconds: caller.run(case.name, concurrency, seconds)


def run(options: Options) -> dict[str, Any]:
    """Every table as rows, by name, and the machine that they are of."""
    before = machine()
    tables: dict[str, Rows] = {"load": [], "ratios": [], "cold": []}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("starting the servers", total=None)
        cold: Rows = []
        for _ in range(options.starts - 1):
            with running(options) as (_targets, rows):
                cold += rows
        with running(options) as (targets, rows):
            cold += rows
            progress.update(task, total=len(options.cases) * len(options.concurrency) * options.rounds * len(targets))
            for case in options.cases:
                for concurrency in options.concurrency:
                    samples: dict[str, list[Sample]] = {name: [] for name in targets}
                    for _ in range(options.rounds):
                        for name, target in targets.items():
                            progress.update(task, description=f"{case.name}, {concurrency} at a time: {name}")
                            samples[name].append(target(case, concurrency, options.seconds))
                            progress.advance(task)
                    whole = {name: merged(taken) for name, taken in samples.items()}
                    tables["load"] += load_rows(case, concurrency, whole)
                    tables["ratios"] += ratio_rows(case, concurrency, whole)
    tables["cold"] = middle(cold)
    return {"machine": before, "load after": machine()["load"], "tables": tables}


def load_rows(case: Case, concurrency: int, whole: Mapping[str, Sample]) -> Rows:
    return [
        {
            "request": case.name,
            "at a time": concurrency,
            "server": name,
            "requests/s": sample.requests_per_s,
            "p50 ms": sample.quantile_ms(0.5),
            "p99 ms": sample.quantile_ms(0.99),
            "cpu ms/request": sample.cpu_ms,
            "answer MB": sample.answer_bytes / 1e6,
            "requests": len(sample.latencies),
            "errors": sample.errors,
        }
        for name, sample in whole.items()
    ]


def ratio_rows(case: Case, concurrency: int, whole: Mapping[str, Sample]) -> Rows:
    """How many times the peer's requests per CPU-second, and per second, each way of asking Greenroom reaches."""
    if PEER not in whole:
        return []
    peer = whole[PEER]
    return [
        {
            "request": case.name,
            "at a time": concurrency,
            "server": name,
            "per cpu-second, times": peer.cpu_ms / sample.cpu_ms,
            "requests/s, times": sample.requests_per_s / peer.requests_per_s,
        }
        for name, sample in whole.items()
        if name != PEER
    ]


def middle(rows: Rows) -> Rows:
    """Of the rows of several starts, the one of the median ratio for each server and request."""
    grouped: dict[tuple[str, str], Rows] = {}
    for row in rows:
        grouped.setdefault((row["server"], row["request"]), []).append(row)
    return [sorted(same, key=lambda row: float(row["ratio"]))[len(same) // 2] for same in grouped.values()]


TITLES = {
    "cold": "The first requests after a server is healthy, ms by the client's clock, against its steady state",
    "load": "Load: processor time is of the server's whole process tree",
    "ratios": f"Greenroom over {PEER}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="vLLM's virtual environment; without it Greenroom is alone.")
    parser.add_argument("--model", default="qwen2_5_vl", help="A folder, or a family of tests.checkpoints.")
    parser.add_argument("--renders", type=int, default=1, help="Render replicas of each application.")
    parser.add_argument("--engine", action="store_true", help="Start an engine replica beside them, too.")
    parser.add_argument("--cases", help=f"Comma-separated numbers from 1: {', '.join(case.name for case in CASES)}.")
    parser.add_argument("--concurrency", default="1,8", help="Comma-separated: requests at a time.")
    parser.add_argument("--quick", action="store_true", help="One short round of each.")
    parser.add_argument("--json", type=Path, help="Write the tables there, too.")
    arguments = parser.parse_args()
    # The servers end with the blocks that they are started in, also where the bench is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = [CASES[int(number) - 1] for number in arguments.cases.split(",")] if arguments.cases else CASES
    seconds, rounds, starts = (1.0, 1, 1) if arguments.quick else (4.0, 3, 3)
    model = folder_of(arguments.model).resolve()
    at_a_time = [int(number) for number in arguments.concurrency.split(",")]
    report = run(
        Options(model, arguments.peer, arguments.renders, arguments.engine, chosen, at_a_time, seconds, rounds, starts)
    )
    console.print(report["machine"], f"load after: {report['load after']}")
    for name, title in TITLES.items():
        if report["tables"][name]:
            show(title, report["tables"][name])
    if arguments.json is not None:
        save(arguments.json, report)


if __name__ == "__main__":
    main()

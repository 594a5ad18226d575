"""How the render tier scales over its replicas, on a cluster: requests a second, and one request of 64 images.

    python -m bench.replicas [--counts 1,2,4,8] [--loaders 4] [--seconds 6] [--json FILE]

Each count is a fresh Greenroom in its high-throughput mode, whose replicas have one media thread each. The load comes
from processes of its own, so that no client is the limit. The machine should have three cores for each replica.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench import load
from bench.bodies import CASES, Bodies, Case
from bench.measure import console, machine, save, show
from bench.render import folder_of
from bench.servers import Greenroom, Server

MSGPACK = "application/msgpack"
MEASURED = [case for case in CASES if case.name in ("640x480", "1920x1080", "layout, 4 x 1280x720")]
MANY = Case("64 x 1280x720", ((1280, 720),) * 64)
AT_A_TIME = 3  # requests a replica: one is rendered, one is read or written, one is there when they end
ROUNDS = 3
Rows = list[dict[str, Any]]


def one_loader(url: str, pid: int, number: int, concurrency: int, seconds: float) -> tuple[float, int]:
    """Requests a second of one client process, and its errors."""
    sample = load.run(url, pid, MEASURED[number].bodies(), concurrency, seconds, MSGPACK)
    return sample.requests_per_s, sample.errors


def rate(pool: ProcessPoolExecutor, server: Server, number: int, renders: int, options: argparse.Namespace) -> float:
    """Requests a second of all loaders together.

    Raises:
        RuntimeError: A request failed.
    """
    concurrency = max(1, -(-AT_A_TIME * renders // options.loaders))
    url = f"{server.url}/direct"
    running = [
        pool.submit(one_loader, url, server.pid, number, concurrency, options.seconds) for _ in range(options.loaders)
    ]
    answers = [future.result() for future in running]
    if any(errors for _, errors in answers):
        raise RuntimeError(f"requests failed: {MEASURED[number].name} on {renders} replicas")
    return sum(each for each, _ in answers)


def many_s(url: str, bodies: Bodies) -> float:
    """Seconds of one request of many images, median of a few."""
    client = load.Client(url, MSGPACK)
    taken = []
    for _ in range(ROUNDS):
        body = bodies()
        begun = time.perf_counter()
        client.send(body)
        taken.append(time.perf_counter() - begun)
    client.close()
    return statistics.median(taken)


def run(model: Path, counts: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    rates: dict[int, list[float]] = {}
    many: dict[int, float] = {}
    context = multiprocessing.get_context("spawn")
    bodies = MANY.bodies()
    with ProcessPoolExecutor(options.loaders, context) as pool:
        for renders in counts:
            console.print(f"{renders} render replicas …")
            with Greenroom(model, renders, media_threads=1) as server:
                for number in range(len(MEASURED)):
                    rate(pool, server, number, renders, options)  # every loader has met every replica
                rates[renders] = [rate(pool, server, number, renders, options) for number in range(len(MEASURED))]
                many[renders] = many_s(f"{server.url}/direct", bodies)
            console.print(f"requests/s: {rates[renders]}, 64 images: {many[renders]:.2f} s")
    tables = {"replicas": scaling(rates), "64 images": spread(many)}
    return {"machine": machine(), "tables": tables}


def scaling(rates: dict[int, list[float]]) -> Rows:
    first = next(iter(rates))
    return [
        {
            "request": case.name,
            "replicas": count,
            "requests/s": row[number],
            "of linear": row[number] / rates[first][number] * first / count,
        }
        for number, case in enumerate(MEASURED)
        for count, row in rates.items()
    ]


def spread(many: dict[int, float]) -> Rows:
    first = next(iter(many.values()))
    return [{"replicas": count, "one request, s": taken, "times": first / taken} for count, taken in many.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2_5_vl", help="A folder, or a family of tests.checkpoints.")
    parser.add_argument("--counts", default="1,2,4,8", help="Comma-separated numbers of render replicas.")
    parser.add_argument("--loaders", type=int, default=4, help="Client processes.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Of each load.")
    parser.add_argument("--json", type=Path, help="Write the tables there, too.")
    options = parser.parse_args()
    counts = [int(count) for count in options.counts.split(",")]
    report = run(folder_of(options.model).resolve(), counts, options)
    console.print(report["machine"])
    show("Render replicas, MessagePack answers, through HAProxy", report["tables"]["replicas"])
    show("One request of 64 images of 1280x720", report["tables"]["64 images"])
    if options.json is not None:
        save(options.json, report)


if __name__ == "__main__":
    main()

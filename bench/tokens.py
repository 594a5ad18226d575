"""The time between tokens at a client, while other requests are rendered.

    python -m bench.tokens [--model qwen2_5_vl] [--borrow never,auto,always] [--json FILE]

One client reads stream after stream from the application with one render replica and one engine replica; beside it run
render-only requests, or generations of one token whose images nobody has seen. Each way to borrow is a fresh Greenroom.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import multiprocessing
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench import load
from bench.bodies import Case
from bench.measure import console, machine, save, show
from bench.render import folder_of
from bench.servers import Greenroom, Server

CHAT = "/v1/chat/completions"
BORROW = "never,auto,always"
PICTURE = ((1280, 720),)
# What runs beside the stream: where it is sent, what, and by how many clients.
BESIDE: dict[str, tuple[str, Case, int]] = {
    "nothing": (CHAT, Case("text"), 0),
    "render-only requests": (load.PATH, Case("1280x720", PICTURE), 4),
    "generations with images": (CHAT, Case("1280x720", PICTURE, more={"max_tokens": 1}), 2),
}
STREAM = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 256, "ignore_eos": True, "stream": True}


def gaps_s(url: str, seconds: float) -> list[float]:
    """Seconds between the tokens of streams that one client reads, one after the other."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=load.TIMEOUT_S)
    gaps: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        connection.request("POST", CHAT, json.dumps(STREAM), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read(500)!r}")
        times = [time.perf_counter() for line in answer if line.startswith(b"data: {")]
        gaps += [later - earlier for earlier, later in itertools.pairwise(times)]
    connection.close()
    return gaps


def beside(url: str, pid: int, name: str, seconds: float) -> load.Sample:
    """The load of that name, to its end."""
    path, case, clients = BESIDE[name]
    return load.run(url, pid, case.bodies(), clients, seconds, "application/json", path=path)


def measure(server: Server, borrow: str, seconds: float, pool: Executor) -> list[dict[str, Any]]:
    """Rows of the table; the load has a process of its own, so that it does not hold up the stream's reader."""
    rows: list[dict[str, Any]] = []
    for name in BESIDE:
        running = pool.submit(beside, server.url, server.pid, name, seconds + 1)
        time.sleep(0.5)  # the load is there before the stream is
        gaps = sorted(gaps_s(server.url, seconds))
        sample = running.result()
        p50, p99 = (1e3 * gaps[int(part * len(gaps))] for part in (0.5, 0.99))
        idle = rows[0] if rows else {"p50 ms": p50, "p99 ms": p99}
        others = {"requests/s beside": sample.requests_per_s, "errors": sample.errors}
        times = {"p50, times": p50 / idle["p50 ms"], "p99, times": p99 / idle["p99 ms"]}
        rows.append({"borrow": borrow, "beside": name, "p50 ms": p50, "p99 ms": p99, **times, **others})
        console.print(
            f"beside {name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {others['requests/s beside']:.1f} requests/s"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2_5_vl", help="A folder, or a family of tests.checkpoints.")
    parser.add_argument("--borrow", default=BORROW, help="Ways to borrow, comma-separated.")
    parser.add_argument("--seconds", type=float, default=8.0, help="Of each load.")
    parser.add_argument("--json", type=Path, help="Write the table there, too.")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(len, ()).result()  # it has started
        for borrow in options.borrow.split(","):
            console.print(f"borrow: {borrow} …")
            with Greenroom(folder_of(options.model).resolve(), engine=True, borrow=borrow) as server:
                gaps_s(server.url, 2.0)
                rows += measure(server, borrow, options.seconds, pool)
    report = {"machine": machine(), "tables": {"tokens": rows}}
    console.print(report["machine"])
    show("Time between tokens at a client", rows)
    if options.json is not None:
        save(options.json, report)


if __name__ == "__main__":
    main()

"""How rendering scales over cores, in process: the threads of one renderer, and renderers in processes of their own.

    python -m bench.scaling [--model qwen2_5_vl] [--counts 1,2,4,8] [--json FILE]

One request of 64 images of 1280x720 on a renderer with so many media threads; and so many processes, each rendering
images of 640x480 one after the other, as so many render replicas would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.measure import console, machine, save, show
from bench.pictures import photograph, unlike
from bench.render import LENGTH, chat, folder_of
from renderer.config import RendererConfig
from renderer.renderer import Renderer

IMAGES = 64
SECONDS = 6.0
ROUNDS = 5


def renderer_of(model: str, threads: int) -> Renderer:
    torch.set_num_threads(1)
    config = RendererConfig(
        model=model, max_model_len=LENGTH, media_threads=threads, render_threads=1, processor_cache_bytes=0
    )
    renderer = Renderer(config)
    renderer.warmup()
    return renderer


def request_s(model: str, threads: int) -> float:
    """Seconds of one request of 64 images, median of a few."""
    renderer = renderer_of(model, threads)
    request = chat([unlike(photograph(1280, 720), number) for number in range(IMAGES)])
    taken = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        renderer.render_chat(request, skip_mm_cache=True)
        taken.append(time.perf_counter() - begun)
    renderer.close()
    return statistics.median(taken)


def requests_per_s(model: str, processes: int) -> float:
    """Requests a second of so many processes together, while all of them run."""
    command = [sys.executable, "-m", "bench.scaling", "--model", model, "--one"]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(processes)]
    for process in running:
        if process.stdout is not None:
            process.stdout.readline()  # it is warm
    for process in running:
        if process.stdin is not None:
            process.stdin.write("\n")
            process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in running)


def one(model: str) -> None:
    """One of the processes: says that it is warm, waits for a line, renders for some seconds, prints its rate."""
    renderer = renderer_of(model, 1)
    request = chat([photograph(640, 480)])
    print("warm", flush=True)
    sys.stdin.readline()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        renderer.render_chat(request, skip_mm_cache=True)
        count += 1
    print(json.dumps(count / (time.perf_counter() - begun)))
    renderer.close()


def run(model: str, counts: list[int]) -> dict[str, Any]:
    threads = {count: request_s(model, count) for count in counts}
    processes = {count: requests_per_s(model, count) for count in counts}
    first = counts[0]
    tables = {
        "threads": [
            {"media threads": count, "64 images, s": seconds, "times": threads[first] / seconds}
            for count, seconds in threads.items()
        ],
        "processes": [
            {"processes": count, "requests/s": rate, "of linear": rate / processes[first] * first / count}
            for count, rate in processes.items()
        ],
    }
    return {"machine": machine(), "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2_5_vl", help="A folder, or a family of tests.checkpoints.")
    parser.add_argument("--counts", default="1,2,4,8", help="Comma-separated numbers of threads and of processes.")
    parser.add_argument("--json", type=Path, help="Write the tables there, too.")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = str(folder_of(arguments.model))
    if arguments.one:
        one(model)
        return
    report = run(model, [int(count) for count in arguments.counts.split(",")])
    console.print(report["machine"])
    show("One request of 64 images of 1280x720", report["tables"]["threads"])
    show("Renderers in processes, images of 640x480", report["tables"]["processes"])
    if arguments.json is not None:
        save(arguments.json, report)


if __name__ == "__main__":
    main()

"""What the first request after warm-up costs beside the steady state, in every thread of one fresh renderer.

Runs as a process of its own, because what is measured is what a process has not done yet:

    python -m bench.warm MODEL [--cold]     prints one line of JSON: rows of milliseconds of the thread's processor time
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.measure import thread_ms
from bench.pictures import photograph
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, ImagePart, Message, TextPart
from renderer.prompt import ImageSize
from renderer.renderer import Renderer
from renderer.threads import WarmPool
from renderer.warmup import USUAL_SIZE

Rows = list[dict[str, Any]]
THREADS = 2
STEADY = 11


def warm_up(model: str, processes: int) -> Rows:
    """First and steady cost after warm-up, and without it: of fresh processes, the one of the median ratio."""
    rows: Rows = []
    for state in ("warm", "cold"):
        runs = [_in_process(model, state == "cold") for _ in range(processes)]
        for same in zip(*runs, strict=True):
            rows.append({"start": state, **sorted(same, key=lambda row: float(row["ratio"]))[len(same) // 2]})
    return rows


def _in_process(model: str, cold: bool) -> Rows:
    command = [sys.executable, "-m", "bench.warm", model, *(["--cold"] if cold else [])]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    rows: Rows = json.loads(output.splitlines()[-1])
    return rows


def measure(model: str, cold: bool) -> Rows:
    """An image of the usual size, one of the largest size that the model takes, and text."""
    torch.set_num_threads(1)
    config = RendererConfig(model=model, processor_cache_bytes=0, media_threads=THREADS, render_threads=THREADS)
    renderer = Renderer(config)
    if not cold:
        renderer.warmup()
    rows = [_item(renderer, size) for size in (USUAL_SIZE, renderer.family.largest_image(renderer.max_model_len))]
    if renderer.has_chat_template:
        request = ChatRequest((Message("user", (TextPart("What is this?"),)),))
        rows.append({"what": "text", **_first_and_steady(renderer.request_pool, lambda: renderer.layout(request))})
    renderer.close()
    return rows


def _item(renderer: Renderer, size: ImageSize) -> dict[str, Any]:
    processor = renderer.readonly_mm_processor
    part = ImagePart(data=photograph(size.width, size.height))
    (item,) = processor.identify([part], None, {})
    taken = _first_and_steady(renderer.media_pool, lambda: processor.process(item, renderer.family))
    return {"what": f"{size.width}x{size.height}", **taken}


def _first_and_steady(pool: WarmPool, fn: Callable[[], object]) -> dict[str, float]:
    """The slowest thread's first run, and the median of the later ones."""
    run = thread_ms(fn)
    first = max(pool.each(run))
    steady = statistics.median(taken for _ in range(STEADY) for taken in pool.each(run))
    return {"first ms": first, "steady ms": steady, "ratio": first / steady}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cold", action="store_true", help="Leave the warm-up out.")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.cold)))


if __name__ == "__main__":
    main()

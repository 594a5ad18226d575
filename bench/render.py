"""The renderer in process against the bare Hugging Face image processor and tokenizer, in one run.

    python -m bench.render [--quick] [--models qwen2_5_vl,demo/model] [--peer VENV] [--json FILE]

The bare processor runs in a process of its own, request by request in turn with the renderer: here with Pillow's
arithmetic, and with `--peer` in that virtual environment too, which has torchvision (vLLM's has). Figures are medians.
Models are folders, or families of `tests.checkpoints`: random weights, and the public model's processor settings.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from bench.hugging_face import Bare
from bench.measure import by_turns, console, machine, save, show, timed
from bench.pictures import photograph, sentence
from bench.stages import pixel_path
from bench.verdicts import BUDGETS, verdicts
from bench.warm import warm_up
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, CompletionRequest, ImagePart, Message, TextPart
from renderer.renderer import Renderer
from tests.checkpoints import IMAGE_FAMILIES, checkpoint

Rows = list[dict[str, Any]]
VGA, HD, FULL_HD = (640, 480), (1280, 720), (1920, 1080)
FOUR = "4 x 1280x720"
CASES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "text": (),
    "640x480": (VGA,),
    "1280x720": (HD,),
    "1920x1080": (FULL_HD,),
    FOUR: (HD,) * 4,
}
TEXT = sentence(60)
# No request of the bench is refused for its length.
LENGTH = 1 << 20
TITLES = {
    "overhead": "Caching off: ms of one request of 60 words and images, over the bare processor's (budget 1.1)",
    "shortcuts": "Four images of 1280x720: how many times quicker than their tensors by the bare processor (25; 20)",
    "pixel path": "One thread, ms of processor time, JPEG to tensors (budget for Qwen: 640x480 3.0, 1920x1080 25)",
    "warm-up": "The slowest thread's first run against the steady state, ms of its processor time (budget, warm: 1.2)",
    "verdicts": "Budgets",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: models, requests, turns for each figure, processes for each of warm-up, and against whom."""

    models: tuple[str, ...]
    cases: tuple[str, ...]
    turns: int
    processes: int
    peer: Path | None

    @property
    def pythons(self) -> list[Path]:
        return [Path(sys.executable), *([] if self.peer is None else [self.peer / "bin" / "python"])]


@dataclass(frozen=True, slots=True)
class Subject:
    """One model: a renderer without caches and one with, and the bare processors by the name of their arithmetic."""

    uncached: Renderer
    cached: Renderer
    bare: Mapping[str, Bare]
    folder: Path

    def pictures(self, case: str) -> list[bytes]:
        most = self.uncached.family.max_items
        return [photograph(*size, seed=seed) for seed, size in enumerate(CASES[case][:most])]

    def written(self, pictures: Sequence[bytes]) -> list[Path]:
        """The pictures as files, for the other processes to read."""
        files = [self.folder / f"{number}.jpg" for number in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            file.write_bytes(picture)
        return files


def folder_of(model: str) -> Path:
    return checkpoint(model) if model in IMAGE_FAMILIES else Path(model)


@contextmanager
def subject(model: str, options: Options) -> Iterator[Subject]:
    """The subject, ready to render, for as long as the block lasts."""
    config = RendererConfig(
        model=str(folder_of(model)), max_model_len=LENGTH, media_threads=1, render_threads=1, processor_cache_bytes=0
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        uncached = Renderer(config)
        cached = Renderer(config.model_copy(update={"processor_cache_bytes": 1 << 30}))
        for renderer in (uncached, cached):
            stack.callback(renderer.close)
        (item,) = uncached.render_chat(chat([photograph(64, 64)]), skip_mm_cache=True).items
        normalise = str((item.tensors or {})["pixel_values"].dtype) != "uint8"
        bare = [stack.enter_context(Bare(python, folder_of(model), normalise)) for python in options.pythons]
        yield Subject(uncached, cached, {one.backend: one for one in bare}, folder)


def overhead(one: Subject, options: Options) -> Rows:
    """Every case, with caching off: the renderer's milliseconds, and how many times the bare processor's they are."""
    rows = []
    for case in options.cases:
        pictures = one.pictures(case)
        files = one.written(pictures)
        contenders = {"renderer": timed(rendering(one.uncached, pictures))}
        spent = by_turns(
            contenders | {name: bare.request(TEXT, files) for name, bare in one.bare.items()}, options.turns
        )
        row: dict[str, Any] = {"request": case, "cpu": spent["renderer"].cpu_ms, "wall": spent["renderer"].wall_ms}
        for name in one.bare:
            row[f"{name} cpu"] = spent[name].cpu_ms
            row[f"/ {name}"] = spent["renderer"].cpu_ms / spent[name].cpu_ms
        rows.append(row)
    return rows


def shortcuts(one: Subject, options: Options) -> Rows:
    """Four images of 1280x720 laid out, and from the cache, beside their tensors by the bare processor."""
    pictures = one.pictures(FOUR)
    files, request = one.written(pictures), chat(pictures)
    contenders = {
        "layout": timed(lambda: one.uncached.layout(request)),
        "cache hit": timed(lambda: one.cached.render_chat(request, skip_mm_cache=True)),
    }
    spent = by_turns(contenders | {name: bare.request(TEXT, files) for name, bare in one.bare.items()}, options.turns)
    rows = []
    for name in contenders:
        row: dict[str, Any] = {"what": name, "cpu": spent[name].cpu_ms}
        rows.append(row | {f"{bare} times": spent[bare].cpu_ms / spent[name].cpu_ms for bare in one.bare})
    return rows


def chat(pictures: Sequence[bytes]) -> ChatRequest:
    images = tuple(ImagePart(data=picture) for picture in pictures)
    return ChatRequest((Message("user", (*images, TextPart(TEXT))),))


def rendering(renderer: Renderer, pictures: Sequence[bytes]) -> Callable[[], object]:
    if not renderer.has_chat_template:
        return lambda: renderer.render_completion(CompletionRequest((TEXT,)), skip_mm_cache=True)
    request = chat(pictures)
    return lambda: renderer.render_chat(request, skip_mm_cache=True)


def run(options: Options) -> dict[str, Any]:
    """Every table as rows, by name, and the machine that they are of."""
    tables: dict[str, Rows] = {name: [] for name in TITLES}
    torch.set_num_threads(1)
    before = machine()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=2 * len(options.models))
        for model in options.models:
            progress.update(task, description=f"{model}: renderer and bare processor")
            with subject(model, options) as one:
                own = {"overhead": overhead(one, options), "shortcuts": shortcuts(one, options)}
                own["pixel path"] = pixel_path(one.uncached, options.turns)
            progress.update(task, advance=1, description=f"{model}: warm-up in fresh processes")
            own["warm-up"] = warm_up(str(folder_of(model)), options.processes)
            own["verdicts"] = verdicts(own)
            progress.advance(task)
            for name, rows in own.items():
                tables[name] += [{"model": model, **row} for row in rows]
    return {"machine": before, "load after": machine()["load"], "budgets": BUDGETS, "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="The demo model and few turns: half a minute.")
    parser.add_argument("--models", help=f"Comma-separated: folders, or of {', '.join(IMAGE_FAMILIES)}.")
    parser.add_argument("--peer", type=Path, help="A virtual environment with Transformers and torchvision.")
    parser.add_argument("--json", type=Path, help="Write the tables there, too.")
    arguments = parser.parse_args()
    chosen = arguments.models.split(",") if arguments.models else None
    options = Options(tuple(chosen or IMAGE_FAMILIES), tuple(CASES), 15, 5, arguments.peer)
    if arguments.quick:
        options = Options(tuple(chosen or ("demo/model",)), ("text", "640x480"), 3, 1, arguments.peer)
    report = run(options)
    console.print(report["machine"], f"load after: {report['load after']}")
    for name, title in TITLES.items():
        show(title, report["tables"][name])
    if arguments.json is not None:
        save(arguments.json, report)


if __name__ == "__main__":
    main()

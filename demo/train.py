"""Trains the demo model: `python -m demo.train --out FOLDER`.

One data-centre GPU and a dozen CPU processes for the pictures; `--smoke` makes a few tiny steps on a CPU.
The log has one JSON object a line.
"""

import argparse
import json
import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from demo.batches import Batch, Batches, BatchSize
from demo.checkpoint import make_model, save_model
from demo.forward import run
from demo.muon import Muon
from demo.scoring import report, score
from demo.tokenizer import load_tokenizer, save_tokenizer

CLASSES = 33  # nothing, or one of 4 shapes x 8 colours
WARMUP = 200
SMOKE = BatchSize(conversations=4, image_tokens=150, largest=30)


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    steps: int = 4200
    seconds: float = math.inf  # the schedule ends by then, whatever the number of steps
    seed: int = 0
    workers: int = 13
    matrix_lr: float = 0.015
    other_lr: float = 0.0015
    warmup: int = WARMUP
    size: BatchSize = field(default_factory=BatchSize)
    evaluation: int = 8  # held-out batches


class Helpers(nn.Module):
    """Heads that exist in training only: what a cell shows, and where an image token is."""

    balance: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cells = nn.Linear(hidden, 2 * CLASSES)
        self.place = nn.Linear(hidden, 2)
        rarely_wanted = torch.ones(CLASSES)
        rarely_wanted[0] = 0.15
        self.register_buffer("balance", rarely_wanted)

    def cell_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of what covers each cell and of whose centre lies in it."""
        covering, centres = self.cells(features).float().split(CLASSES, dim=1)
        return functional.cross_entropy(covering, batch.covering, self.balance) + functional.cross_entropy(
            centres, batch.centres, self.balance
        )

    def place_loss(self, probed: Tensor, batch: Batch) -> Tensor:
        """Distance to the row and column of each image token; the unit is 8 cells."""
        return functional.smooth_l1_loss(self.place(probed).float(), batch.coordinates.float() / 8)


class Trainer:
    """The model, its helpers and their optimisers."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.model = make_model(plan.seed).to(device)
        self.helpers = Helpers(self.model.config.text_config.hidden_size).to(device)
        named = dict(self.model.named_parameters())
        matrices = [p for name, p in named.items() if p.ndim == 2 and "embed_tokens" not in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in named.values() if id(p) not in chosen] + list(self.helpers.parameters())
        self.parameters = matrices + others
        self.muon = Muon(matrices, plan.matrix_lr)
        fused = device.type == "cuda"
        self.adam = torch.optim.AdamW(others, plan.other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)

    def step(self, batch: Batch, step: int, progress: float) -> dict[str, Tensor]:
        """One optimisation step; returns the losses, still on the device."""
        rate = min(1.0, (step + 1) / self.plan.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        self.muon.lr = self.plan.matrix_lr * rate
        self.adam.param_groups[0]["lr"] = self.plan.other_lr * rate
        losses = self.losses(batch)
        total = losses["text"]
        if "cells" in losses:
            total = total + 0.5 * (1 - progress) * losses["cells"] + (1 - 0.8 * progress) * losses["place"]
        for parameter in self.parameters:
            parameter.grad = None
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step()
        self.adam.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The text loss and, where there are pictures, those of the helpers."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features, hidden, probed = run(self.model, batch)
            logits = hidden.index_select(0, batch.asked) @ self.model.model.language_model.embed_tokens.weight.T
            each = functional.cross_entropy(logits.float(), batch.wanted, reduction="none")
            losses = {"text": (each * batch.weights).sum() / batch.weights.sum()}
            if len(batch.places):
                losses["cells"] = self.helpers.cell_loss(features, batch)
                losses["place"] = self.helpers.place_loss(probed, batch)
        return losses


def train(plan: Plan, out: Path, device: torch.device) -> list[dict[str, Any]]:
    """Train, write the checkpoint to `out` and return the log."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    trainer, log = Trainer(plan, device), Log(out / "train.jsonl")
    held_out = Batches("held out", plan.evaluation, plan.size)
    checks = [held_out[index].to(device) for index in range(plan.evaluation)]
    step, progress = 0, 0.0
    for step, batch in enumerate(_batches(plan, device)):
        elapsed = time.monotonic() - began
        progress = max(progress, step / plan.steps, elapsed / plan.seconds)
        if progress >= 1:
            break
        losses = trainer.step(batch.to(device), step, progress)
        log.add(batch, losses)
        if (step + 1) % 100 == 0:
            log.write(step + 1, elapsed)
        if (step + 1) % 1000 == 0:
            log.note({"step": step + 1, "accuracy": report(score(trainer.model, checks))})
            save_model(trainer.model, out)
    save_model(trainer.model, out)
    save_tokenizer(load_tokenizer(), out)
    log.write(step, time.monotonic() - began)
    log.note({"finished": step, "accuracy": report(score(trainer.model, checks)) if checks else {}})
    return log.entries


def _batches(plan: Plan, device: torch.device) -> DataLoader[Batch]:
    cuda = device.type == "cuda"
    return DataLoader(
        Batches(plan.seed, plan.steps + 1, plan.size),
        batch_size=None,
        num_workers=plan.workers,
        prefetch_factor=4 if plan.workers else None,
        pin_memory=cuda,
    )


class Log:
    """Sums losses on the device, writes their means now and then."""

    def __init__(self, path: Path) -> None:
        self.entries: list[dict[str, Any]] = []
        self._path = path
        path.write_text("")
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._conversations = 0

    def add(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Count one step."""
        self._conversations += batch.conversations
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(loss)) + loss
            self._counts[name] = self._counts.get(name, 0) + 1

    def write(self, step: int, seconds: float) -> None:
        """Write the mean losses since the last time."""
        means = {name: round(float(total) / self._counts[name], 5) for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        self.note({"step": step, "seconds": round(seconds, 1), "conversations": self._conversations, **means})

    def note(self, entry: dict[str, Any]) -> None:
        """Write one entry, also to the terminal."""
        self.entries.append(entry)
        line = json.dumps(entry)
        with self._path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and train.jsonl")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end the schedule by then at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=Plan.workers, help="processes that draw pictures")
    parser.add_argument("--smoke", action="store_true", help="tiny batches, a few steps: does it run?")
    arguments = parser.parse_args()
    plan = Plan(arguments.steps, arguments.seconds, arguments.seed, arguments.workers)
    if arguments.smoke:
        plan = Plan(min(arguments.steps, 20), seed=arguments.seed, workers=0, size=SMOKE, evaluation=1, warmup=5)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Every tensor that a process hands over is an open file here.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    # Its attention plans anew for every shape, and almost every batch has a new one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    train(plan, arguments.out, device)


if __name__ == "__main__":
    main()

import json
import math
from pathlib import Path

import pytest
import torch

from demo.batches import Batches, BatchSize
from demo.muon import orthogonal
from demo.train import SMOKE, Plan, Trainer, train

CPU = torch.device("cpu")
TINY = BatchSize(conversations=4, image_tokens=80, largest=20)


def test_batches_depend_on_seed_and_index_alone() -> None:
    batches = Batches(0, 4, SMOKE)
    first, again, next_one = batches[2], Batches(0, 4, SMOKE)[2], batches[3]
    assert torch.equal(first.tokens, again.tokens)
    assert all(torch.equal(a, b) for a, b in zip(first.patches, again.patches, strict=True))
    assert first.tokens.shape != next_one.tokens.shape or not torch.equal(first.tokens, next_one.tokens)


def test_a_batch_asks_for_the_answer_tokens() -> None:
    batch = Batches(0, 1, SMOKE)[0]
    assert torch.equal(batch.tokens.flatten()[batch.asked + 1], batch.wanted)
    assert len(batch.kinds) == int(batch.answers.max()) + 1
    assert sum(rows * columns * len(p) for (rows, columns), p in zip(batch.grids, batch.patches, strict=True)) == len(
        batch.places
    )


def test_the_loss_of_one_batch_falls() -> None:
    trainer = Trainer(Plan(steps=8, warmup=2), CPU)
    batch = next(batch for batch in (Batches(0, 9, TINY)[i] for i in range(9)) if len(batch.places))
    losses = [trainer.step(batch, step, 0.0) for step in range(8)]
    assert all(math.isfinite(float(loss)) for each in losses for loss in each.values())
    for name in ("text", "cells", "place"):
        assert losses[-1][name] < 0.8 * losses[0][name]


def test_training_writes_a_whole_checkpoint(tmp_path: Path) -> None:
    log = train(Plan(steps=2, workers=0, size=TINY, evaluation=1), tmp_path, CPU)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert log[-1]["finished"] == 2
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == log


def test_the_schedule_ends_in_time(tmp_path: Path) -> None:
    log = train(Plan(steps=10_000, seconds=1e-6, workers=0, size=TINY, evaluation=0), tmp_path, CPU)
    assert log[-1]["finished"] == 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12, 5), (1, 5, 12)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices).float())
    assert values.min() > 0.3
    assert values.max() < 1.5

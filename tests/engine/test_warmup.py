"""Warm-up runs what is to come, reports its seconds, leaves nothing behind, and says when it failed."""

from collections.abc import Sequence

import pytest
import torch

from engine.protocol import EngineStats
from engine.warmup import warm_up
from engine.worker import Worker
from renderer.errors import WarmupError
from tests.checkpoints import checkpoint
from tests.engine.builders import engine_config


def worker_of(family: str) -> Worker:
    return Worker(engine_config(checkpoint(family)))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "qwen2"])
def test_every_step_is_reported_and_nothing_is_left(family: str) -> None:
    worker = worker_of(family)
    before = worker.stats
    seconds = warm_up(worker)
    vision = ["encoder_largest", "encoder_usual"] if worker.model.family.takes_images else []
    assert list(seconds) == [*vision, "prefill", "decode_1", "decode_2", "decode_4", "decode_8", "decode_16"]
    assert all(took > 0 for took in seconds.values())
    assert worker.stats == before == EngineStats(blocks_total=worker.pool.num_blocks)
    assert (len(worker.encoder_cache), len(worker.pool._block_of), worker.pool.available) == (0, 0, before.blocks_total)


# max_model_len is 1024 here, less than the processors allow for one picture. Idefics3's tiles are of 169 tokens.
@pytest.mark.parametrize(
    ("family", "largest", "usual"), [("qwen2_5_vl", range(900, 1023), 256), ("idefics3", [1014], 169)]
)
def test_the_largest_picture_is_encoded(
    family: str, largest: Sequence[int], usual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(family)
    encoded: list[int] = []
    encode = worker.model.encode

    def watch(items: list[dict[str, object]]) -> list[torch.Tensor]:
        outputs = encode(items)  # type: ignore[arg-type]
        encoded.extend(len(output) for output in outputs)
        return outputs

    monkeypatch.setattr(worker.model, "encode", watch)
    warm_up(worker)
    assert max(encoded) in largest
    assert min(encoded) == usual


def test_a_failed_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of("qwen2_5_vl")

    def fail(*_: object) -> list[torch.Tensor]:
        raise RuntimeError("no encoder")

    monkeypatch.setattr(worker.model, "encode", fail)
    with pytest.raises(WarmupError, match="encoder_largest"):
        warm_up(worker)

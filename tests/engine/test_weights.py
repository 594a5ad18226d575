"""Weights are replaced in place: greedy tokens are those of `model.generate` on the new ones, and what cannot be taken
leaves the old ones as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from engine.worker import Worker
from renderer.errors import ConfigError, EngineError, RequestError
from tests.checkpoints import checkpoint
from tests.engine.builders import GREEDY, Lab, Picture, Rig, Text, engine_config, lab, with_other_weights

FAMILY = "qwen2_5_vl"
PARTS = (Text(8), Picture(1, 84, 56), Text(4, 1))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_other_weights(checkpoint(FAMILY), tmp_path_factory.mktemp("other") / "checkpoint")


@pytest.fixture
def rig() -> Rig:
    return Rig(Worker(engine_config(checkpoint(FAMILY))))


def test_new_weights_answer_as_generate_does_on_them(rig: Rig, other: Path) -> None:
    prompt = lab(FAMILY).prompt(*PARTS)
    before, after = lab(FAMILY).alone(prompt, 10), Lab(other).alone(prompt, 10)
    assert before != after
    assert rig.answers(prompt) == [before]
    rig.worker.reload(str(other))
    assert rig.answers(prompt, prompt) == [after, after]
    rig.worker.reload(None)
    assert rig.answers(prompt) == [before]


def test_what_old_weights_computed_is_forgotten_and_processed_items_are_kept(rig: Rig, other: Path) -> None:
    prompt = lab(FAMILY).prompt(*PARTS)
    rig.submit(prompt, keep=True)
    rig.run()
    runs, held = rig.worker.stats.encoder_runs, rig.worker.receiver.keys()
    rig.submit(prompt, keep=True)
    rig.run()
    assert rig.worker.stats.encoder_runs == runs
    assert rig.worker.stats.cached_tokens > 0
    cached = rig.worker.stats.cached_tokens
    rig.worker.reload(str(other))
    rig.submit(prompt, keep=True)
    rig.run()
    assert rig.worker.stats.encoder_runs == runs + 1
    assert rig.worker.stats.cached_tokens == cached
    assert rig.worker.receiver.keys() == held != frozenset()


def test_weights_do_not_change_under_a_request(rig: Rig, other: Path) -> None:
    rig.submit(lab(FAMILY).prompt(Text(8)), GREEDY)
    with pytest.raises(EngineError):
        rig.worker.reload(str(other))
    rig.run()


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "qwen2"])
def test_another_kind_of_model_is_refused_and_changes_nothing(rig: Rig, family: str) -> None:
    prompt = lab(FAMILY).prompt(*PARTS)
    with pytest.raises(RequestError):
        rig.worker.reload(str(checkpoint(family)))
    assert rig.answers(prompt) == [lab(FAMILY).alone(prompt, 10)]


def test_a_folder_that_is_not_there_is_refused(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        rig.worker.reload(str(tmp_path / "nowhere"))


def test_a_checkpoint_that_lacks_weights_is_refused(rig: Rig, other: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(other, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(RequestError):
        rig.worker.reload(str(folder))


def test_weights_that_the_model_has_no_place_for_are_passed_over(rig: Rig, other: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(other, tmp_path / "more")
    weights = load_file(folder / "model.safetensors") | {"v_head.weight": torch.ones(1, 32)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    prompt = lab(FAMILY).prompt(*PARTS)
    rig.worker.reload(str(folder))
    assert rig.answers(prompt) == [Lab(other).alone(prompt, 10)]


def test_a_checkpoint_that_breaks_off_is_refused_and_changes_nothing(rig: Rig, other: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(other, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    prompt = lab(FAMILY).prompt(*PARTS)
    with pytest.raises(RequestError):
        rig.worker.reload(str(folder))
    assert rig.answers(prompt) == [lab(FAMILY).alone(prompt, 10)]


def test_an_engine_starts_with_the_weights_that_it_is_told(other: Path) -> None:
    prompt = lab(FAMILY).prompt(*PARTS)
    rig = Rig(Worker(engine_config(checkpoint(FAMILY), weights=str(other))))
    assert rig.answers(prompt) == [Lab(other).alone(prompt, 10)]


def test_weights_that_are_not_there_fail_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Worker(engine_config(checkpoint(FAMILY), weights=str(tmp_path)))

"""A checkpoint that a vLLM could not take whole is refused by the heads of its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.vllm_weights import check_weights, checkpoint_folder
from renderer.errors import RequestError
from tests.checkpoints import checkpoint

OWN = checkpoint("qwen2_5_vl")
Weights = dict[str, torch.Tensor]
NORM = "model.norm.weight"


def as_it_is(name: str) -> str:
    return name


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(OWN, tmp_path / "copy")


def changed(folder: Path, change: Callable[[Weights], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    """The same weights in two files and an index, and a third file that it does not name."""
    weights = load_file(folder / "model.safetensors")
    names = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(weights)}
    for part in ("part-0.safetensors", "part-1.safetensors"):
        save_file({name: weights[name] for name in names if names[name] == part}, folder / part)
    (folder / "model.safetensors").unlink()
    save_file({"stray": torch.zeros(1)}, folder / "stray.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_the_same_weights_fit_in_any_float_type_and_in_any_number_of_files(copy: Path) -> None:
    changed(copy, lambda weights: weights.update({NORM: weights[NORM].half()}))
    check_weights(copy, OWN, as_it_is)
    check_weights(sharded(copy), OWN, as_it_is)


FAULTS: dict[str, tuple[Callable[[Weights], object], str]] = {
    "one is lacking": (lambda weights: weights.pop(NORM), "lacks model.norm"),
    "one is too many": (
        lambda weights: weights.update(more=weights[NORM].clone()),
        "has more, which the model has no place for: write it without",
    ),
    "one is of another shape": (lambda weights: weights.update({NORM: weights[NORM][:-1]}), "another shape"),
    "one is quantised": (lambda weights: weights.update({NORM: weights[NORM].char()}), "another shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_refused_by_name(copy: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(RequestError, match=message) as refused:
        check_weights(changed(copy, change), OWN, as_it_is)
    assert refused.value.param == "path"


def test_what_cannot_be_read_is_refused(copy: Path, tmp_path: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for folder in (copy, tmp_path / "nowhere", tmp_path):
        with pytest.raises(RequestError, match=f"the weights of {folder} cannot be read"):
            check_weights(folder, OWN, as_it_is)
    other = shutil.copytree(OWN, tmp_path / "other")
    for name in ("config.json", "model.safetensors.index.json"):
        (other / name).write_text("[]")
        with pytest.raises(RequestError, match="cannot be read"):
            check_weights(other, OWN, as_it_is)
        shutil.copy(OWN / "config.json", other / "config.json")
    missing = sharded(shutil.copytree(OWN, tmp_path / "shards"))
    (missing / "part-1.safetensors").unlink()
    with pytest.raises(RequestError, match="cannot be read"):
        check_weights(missing, OWN, as_it_is)


def test_weights_in_other_files_are_refused_and_whose_they_are_is_said(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"the weights of .*: .* holds no \*\.safetensors"):
        check_weights(copy, OWN, as_it_is)
    with pytest.raises(RequestError, match=r"the model's own weights .*: .* holds no \*\.safetensors"):
        check_weights(OWN, copy, as_it_is)


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(RequestError, match="is a qwen2_vl"):
        check_weights(checkpoint("qwen2_vl"), OWN, as_it_is)


def test_weights_are_compared_by_their_places_in_the_model(copy: Path) -> None:
    """As vLLM reads names of more than one version of transformers, and leaves out the head that is an embedding."""

    def renamed(weights: Weights) -> None:
        weights["model.language_model.norm.weight"] = weights.pop(NORM)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def place(name: str) -> str | None:
        return None if name.startswith("lm_head.") else name.replace("language_model.", "")

    check_weights(changed(copy, renamed), OWN, place)
    with pytest.raises(RequestError):
        check_weights(copy, OWN, as_it_is)


def test_a_checkpoint_lies_where_it_says_or_where_the_hub_has_put_it(tmp_path: Path) -> None:
    assert checkpoint_folder(str(OWN)) == OWN
    snapshot = tmp_path / "models--an--example" / "snapshots" / "abc"
    shutil.copytree(OWN, snapshot)
    (tmp_path / "models--an--example" / "refs").mkdir()
    (tmp_path / "models--an--example" / "refs" / "main").write_text("abc")
    assert checkpoint_folder("an/example", cache=str(tmp_path)) == snapshot

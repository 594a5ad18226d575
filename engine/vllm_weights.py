"""Whether a checkpoint's weights fit the model that runs in a vLLM, by the heads of their files: nothing is loaded.

vLLM takes weights one by one, over those that it has. What a checkpoint lacks stays as it was, and what is of another
shape fails half-way, so both are found out before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from renderer.errors import RequestError

_INDEX = "model.safetensors.index.json"
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True, slots=True)
class _Weight:
    shape: tuple[int, ...]
    dtype: str

    def fits(self, other: _Weight) -> bool:
        same_kind = self.dtype == other.dtype or {self.dtype, other.dtype} <= _FLOATS
        return same_kind and self.shape == other.shape


def checkpoint_folder(model: str, revision: str | None = None, cache: str | None = None) -> Path:
    """Where a checkpoint lies that has been loaded before.

    Raises:
        OSError: Nowhere on this machine.
    """
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))


def check_weights(path: Path, own: Path, place: Callable[[str], str | None]) -> None:
    """Refuse a checkpoint that a vLLM which runs `own` could not take whole.

    Args:
        place: Where the model puts a weight of this name; None for one that it ignores.

    Raises:
        RequestError: It cannot be read, is of another kind, or lacks a weight, or has one too many or of another shape.
    """
    try:
        kinds = [_kind(folder) for folder in (path, own)]
        theirs, ours = (_weights(folder, place) for folder in (path, own))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RequestError(f"cannot read the weights of {path}: {error}", "path") from error
    if kinds[0] != kinds[1]:
        raise RequestError(f"{path} is a {kinds[0]}, the model a {kinds[1]}", "path")
    for fault, names in {
        "lacks": sorted(ours.keys() - theirs.keys()),
        "has more than the model:": sorted(theirs.keys() - ours.keys()),
        "has of another shape:": sorted(
            name for name in ours.keys() & theirs.keys() if not ours[name].fits(theirs[name])
        ),
    }.items():
        if names:
            raise RequestError(f"the checkpoint {path} {fault} {', '.join(names[:4])}", "path")


def _kind(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["model_type"]


def _weights(folder: Path, place: Callable[[str], str | None]) -> Mapping[str, _Weight]:
    """All weights of a checkpoint, by their places in the model."""
    weights = {}
    for file in _files(folder):
        for name, weight in _head(file):
            placed = place(name)
            if placed is not None:
                weights[placed] = weight
    return weights


def _files(folder: Path) -> list[Path]:
    """
    Raises:
        OSError: There are none.
    """
    index = folder / _INDEX
    if index.exists():
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    return files


def _head(file: Path) -> Iterator[tuple[str, _Weight]]:
    with safe_open(file, framework="numpy") as weights:
        for name in weights.keys():  # noqa: SIM118  # it is no mapping
            part = weights.get_slice(name)
            yield name, _Weight(tuple(part.get_shape()), part.get_dtype())

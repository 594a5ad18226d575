"""Whether a checkpoint's weights fit the model that runs in a vLLM, by the heads of their files: nothing is loaded.

vLLM takes weights one by one, over those that it has. What a checkpoint lacks stays as it was, and what is of another
shape or has no place in the model fails half-way, so all that is found out before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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


_Weights = Mapping[str, _Weight]


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """
    Attributes:
        kind: Its `model_type`.
        weights: By their places in the model.
    """

    kind: str
    weights: _Weights


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
    theirs = _read(path, place, f"the weights of {path} cannot be read")
    ours = _read(own, place, "no others can be taken, for the model's own weights cannot be read")
    if theirs.kind != ours.kind:
        raise RequestError(f"{path} is a {theirs.kind}, the model a {ours.kind}", "path")
    fault = _fault(theirs.weights, ours.weights)
    if fault is not None:
        raise RequestError(f"the checkpoint {path} {fault}", "path")


def _fault(theirs: _Weights, ours: _Weights) -> str | None:
    """What keeps weights from being taken in the place of others."""
    common = ours.keys() & theirs.keys()
    faults = {
        "lacks {}": ours.keys() - theirs.keys(),
        "has {}, which the model has no place for: write it without": theirs.keys() - ours.keys(),
        "has {} of another shape or kind": {name for name in common if not ours[name].fits(theirs[name])},
    }
    for fault, names in faults.items():
        if names:
            return fault.format(", ".join(sorted(names)[:4]))
    return None


def _read(folder: Path, place: Callable[[str], str | None], otherwise: str) -> _Checkpoint:
    """
    Raises:
        RequestError: It cannot be read; says `otherwise`, and why.
    """
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        return _Checkpoint(kind, _weights(folder, place))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise RequestError(f"{otherwise}: {error}", "path") from error


def _weights(folder: Path, place: Callable[[str], str | None]) -> _Weights:
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
        raise FileNotFoundError(f"{folder} holds no *.safetensors, the only files that weights are taken from")
    return files


def _head(file: Path) -> Iterator[tuple[str, _Weight]]:
    with safe_open(file, framework="numpy") as weights:
        for name in weights.keys():  # noqa: SIM118  # it is no mapping
            part = weights.get_slice(name)
            yield name, _Weight(tuple(part.get_shape()), part.get_dtype())

"""Checkpoints with their weights under the names of the published ones.

transformers 5 reads both and writes shorter ones for the vision towers of some families; vLLM 0.32 reads only the
published.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.checkpoints import checkpoint

_SHORTENED = ("llava", "llava_next", "llava_onevision", "gemma3", "paligemma")


def published(family: str) -> Path:
    """The folder of a family's checkpoint as vLLM reads it, made on first use."""
    source = checkpoint(family)
    if family not in _SHORTENED:
        return source
    folder = source.with_name(f"{family}-published")
    if not folder.exists():
        _write(source, folder, "vision_tower.", "vision_tower.vision_model.")
    return folder


def _write(source: Path, folder: Path, short: str, whole: str) -> None:
    building = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    shutil.copytree(source, building, dirs_exist_ok=True)
    weights = load_file(building / "model.safetensors")
    renamed = {name.replace(short, whole) if name.startswith(short) else name: w for name, w in weights.items()}
    save_file(renamed, building / "model.safetensors", {"format": "pt"})
    os.rename(building, folder)

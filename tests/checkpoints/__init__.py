"""Tiny checkpoints, one a family: random weights and a small tokenizer, but the family's true processor configuration.

They are built offline in seconds, the same bytes every time, and never committed:

    python -m tests.checkpoints qwen2_vl /tmp/qwen2_vl
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from tests.checkpoints.gemma import GEMMA3, PALIGEMMA
from tests.checkpoints.idefics import IDEFICS3, SMOLVLM
from tests.checkpoints.internvl import INTERNVL
from tests.checkpoints.llama import LLAMA
from tests.checkpoints.llava import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION
from tests.checkpoints.mistral import MISTRAL3, PIXTRAL
from tests.checkpoints.qwen import QWEN2, QWEN2_5_VL, QWEN2_VL, QWEN3, QWEN3_VL
from tests.checkpoints.spec import Checkpoint

_ALL = (
    QWEN2_VL, QWEN2_5_VL, QWEN3_VL, LLAVA, GEMMA3, IDEFICS3, SMOLVLM, INTERNVL, LLAVA_NEXT, LLAVA_ONEVISION, PIXTRAL,
    MISTRAL3, PALIGEMMA, QWEN2, LLAMA,
)  # fmt: skip
_OF_ENGINES = (QWEN3,)  # to a renderer it is Qwen2
CHECKPOINTS: dict[str, Checkpoint] = {checkpoint.family: checkpoint for checkpoint in (*_ALL, *_OF_ENGINES)}
FAMILIES: tuple[str, ...] = tuple(checkpoint.family for checkpoint in _ALL)
IMAGE_FAMILIES: tuple[str, ...] = tuple(name for name in FAMILIES if CHECKPOINTS[name].image_processor is not None)


def checkpoint(family: str) -> Path:
    """The folder of a family's checkpoint, built on first use and kept as long as its sources stay as they are."""
    folder = _cache() / family
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=folder.parent))
        CHECKPOINTS[family].write(building)
        _publish(building, folder)
    return folder


def _publish(building: Path, folder: Path) -> None:
    """Move into place; where another process was quicker, its folder holds the same bytes."""
    try:
        building.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(building)


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "greenroom" / "checkpoints" / _sources_digest()


def _sources_digest() -> str:
    here = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted([*here.glob("*.py"), *here.glob("templates/*.jinja")]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()

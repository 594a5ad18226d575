"""The model families that the transformers engine runs. A model run as a family it is not answers, wrongly: so a family
that is not in the table is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.families.base import Family
from engine.families.qwen import Qwen3VL, QwenVL
from engine.families.tiles import Idefics3, Llava
from renderer.errors import ConfigError

__all__ = ["FAMILIES", "Family", "find_family"]

FAMILIES: Mapping[str, type[Family]] = {
    "llama": Family,
    "qwen2": Family,
    "qwen3": Family,
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": Qwen3VL,
    "llava": Llava,
    "idefics3": Idefics3,
    "smolvlm": Idefics3,
}


def find_family(config: Any) -> type[Family]:
    """The family of a checkpoint's config.

    Raises:
        ConfigError: Its `model_type` is not one of those that this engine runs.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"the transformers engine does not run model type {config.model_type!r}, only "
            f"{', '.join(sorted(FAMILIES))}; the render tier may serve it all the same, beside another engine"
        )
    return family

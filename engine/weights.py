"""Weights of a checkpoint: loaded at start, and replaced by another one's while the model stays where it is."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from engine.config import EngineConfig
from engine.families import Family
from renderer.errors import ConfigError, RequestError


def load_weights(config: EngineConfig, family: type[Family], dtype: torch.dtype) -> Any:
    """The Hugging Face model of the configuration, on the CPU.

    Raises:
        ConfigError: They cannot be loaded.
    """
    try:
        model = _load(config.model, config.revision, family, dtype)
        if config.weights is not None:
            replace_weights(model, config.weights, family)
        return model
    except (OSError, ValueError, RuntimeError, SafetensorError, RequestError) as error:
        raise ConfigError(f"cannot load the weights of {config.weights or config.model}: {error}") from error


def replace_weights(model: Any, path: str, family: type[Family], revision: str | None = None) -> None:
    """Copy another checkpoint's weights over a model's, in place: what refers to their memory goes on.

    Raises:
        RequestError: It cannot be read, or is not of the same shape. Nothing is changed then.
    """
    try:
        other = _load(path, revision, family, model.dtype)
    except Exception as error:  # whatever is wrong with a checkpoint, the model goes on without it
        raise RequestError(f"cannot load the weights of {path}: {error}", "path") from error
    ours, theirs = _tensors(model), _tensors(other)
    for name, tensor in ours.items():
        if name not in theirs or theirs[name].shape != tensor.shape:
            raise RequestError(f"the weights of {path} are not of the model's shape: {name} differs", "path")
    if model.config.model_type != other.config.model_type or len(ours) != len(theirs):
        raise RequestError(f"{path} is another kind of model", "path")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])


def _load(path: str, revision: str | None, family: type[Family], dtype: torch.dtype) -> Any:
    transformers.utils.logging.disable_progress_bar()
    auto = AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM
    model, found = auto.from_pretrained(
        path, revision=revision, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(f"it lacks {sorted(found['missing_keys'])[:4]}")
    return model


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that no checkpoint holds (rotary frequencies) too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}

"""The table of model families that can be rendered."""

from __future__ import annotations

from collections.abc import Callable

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import ConfigError
from renderer.families import gemma3, idefics3, internvl, llava, llava_next, paligemma, pixtral, qwen_vl
from renderer.family import Family, TextOnly

Build = Callable[[Checkpoint, RendererConfig], Family]

FAMILIES: dict[str, Build] = {
    "qwen2_vl": qwen_vl.build,
    "qwen2_5_vl": qwen_vl.build,
    "qwen3_vl": qwen_vl.build,
    "qwen3_vl_moe": qwen_vl.build,
    "qwen3_5": qwen_vl.build,
    "qwen3_5_moe": qwen_vl.build,
    "llava": llava.build,
    "llava_next": llava_next.build,
    "llava_onevision": llava_next.build,
    "gemma3": gemma3.build,
    "idefics3": idefics3.build,
    "smolvlm": idefics3.build,
    "internvl": internvl.build,
    "mistral3": pixtral.build_mistral3,
    "paligemma": paligemma.build,
}


def choose_family(checkpoint: Checkpoint, config: RendererConfig) -> Family:
    """The family of a checkpoint, by its `model_type`.

    Raises:
        ConfigError: The family is not known, or its options are impossible.
    """
    build = FAMILIES.get(checkpoint.model_type)
    if build is not None:
        return build(checkpoint, config)
    if _is_text_only(checkpoint):
        return TextOnly()
    known = ", ".join([*FAMILIES, TextOnly().name])
    raise ConfigError(f"models of type {checkpoint.model_type!r} cannot be rendered; known are {known}", "model")


def _is_text_only(checkpoint: Checkpoint) -> bool:
    """A decoder whose configuration has no part beside the text model."""
    config = checkpoint.config
    is_decoder = checkpoint.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder
    return is_decoder and config.get_text_config() is config and not config.sub_configs

"""Measures that the tiny models share."""

from __future__ import annotations

from typing import Any

from tests.checkpoints.spec import SPREAD

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BICUBIC = 3
BILINEAR = 2
LANCZOS = 1


def text_model(vocab_size: int, max_length: int, **more: Any) -> dict[str, Any]:
    """A language model of two layers, two heads of 32."""
    return {
        "vocab_size": vocab_size,
        "max_position_embeddings": max_length,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "initializer_range": SPREAD,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **more,
    }


def vision_model(image_size: int, patch_size: int, **more: Any) -> dict[str, Any]:
    """A vision tower of the CLIP or SigLIP kind: two layers, two heads of 32."""
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": SPREAD,
        **more,
    }

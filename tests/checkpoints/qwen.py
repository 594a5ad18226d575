"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, and Qwen2 and Qwen3 without pictures."""

from __future__ import annotations

import transformers

from tests.checkpoints.parts import BICUBIC, CLIP, HALF, text_model
from tests.checkpoints.spec import SPREAD, Checkpoint, Ids, TokenizerSpec

_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_TOKENIZER = TokenizerSpec("bytes", last=_SPECIAL, eos="<|im_end|>", pad="<|endoftext|>")
_ENDS = {"eos_token_id": ["<|im_end|>", "<|endoftext|>"], "pad_token_id": "<|endoftext|>"}
_SIZES = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}
_PIXELS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": BICUBIC,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


def _image_ids(ids: Ids) -> dict[str, int]:
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


def _rope(theta: float, **more: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": [4, 6, 6], **more}}


def _qwen2_vl(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    return transformers.Qwen2VLConfig(
        text_config=text_model(entries, 32768, **_rope(100.0)),
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "initializer_range": SPREAD},
        tie_word_embeddings=True,
        **_image_ids(ids),
    )


def _qwen2_5_vl(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
    return transformers.Qwen2_5_VLConfig(
        text_config=text_model(entries, 128000, **_rope(100.0)),
        vision_config={**vision, "fullatt_block_indexes": [1], "initializer_range": SPREAD},
        tie_word_embeddings=True,
        **_image_ids(ids),
    )


def _qwen3_vl(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
    return transformers.Qwen3VLConfig(
        text_config=text_model(entries, 262144, **_rope(100.0, mrope_interleaved=True)),
        vision_config={**vision, "deepstack_visual_indexes": [0], "initializer_range": SPREAD},
        tie_word_embeddings=True,
        **_image_ids(ids),
    )


def _qwen2(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    return transformers.Qwen2Config(
        **text_model(entries, 32768, eos_token_id=ids("<|im_end|>")), tie_word_embeddings=True
    )


def _qwen3(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    return transformers.Qwen3Config(
        **text_model(entries, 40960, eos_token_id=ids("<|im_end|>")), tie_word_embeddings=True
    )


QWEN2_VL = Checkpoint(
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    _TOKENIZER,
    _qwen2_vl,
    32768,
    "qwen2_vl.jinja",
    image_processor={
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": 14,
        **_PIXELS,
        **_SIZES,
        **CLIP,
    },
    generation={**_ENDS, "do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001},
)
QWEN2_5_VL = Checkpoint(
    "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration",
    _TOKENIZER,
    _qwen2_5_vl,
    128000,
    "qwen2_vl.jinja",
    image_processor={
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        **_PIXELS,
        **_SIZES,
        **CLIP,
    },
    generation={**_ENDS, "do_sample": True, "temperature": 0.000001, "repetition_penalty": 1.05},
)
QWEN3_VL = Checkpoint(
    "qwen3_vl",
    "Qwen3VLForConditionalGeneration",
    _TOKENIZER,
    _qwen3_vl,
    262144,
    "qwen3_vl.jinja",
    image_processor={
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        **_PIXELS,
        **HALF,
    },
    generation={**_ENDS, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
)
QWEN2 = Checkpoint(
    "qwen2",
    "Qwen2ForCausalLM",
    TokenizerSpec("bytes", last=_SPECIAL[:3], eos="<|im_end|>", pad="<|endoftext|>"),
    _qwen2,
    32768,
    "qwen2.jinja",
    generation={**_ENDS, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
)
QWEN3 = Checkpoint(
    "qwen3",
    "Qwen3ForCausalLM",
    TokenizerSpec("bytes", last=_SPECIAL[:3], eos="<|im_end|>", pad="<|endoftext|>"),
    _qwen3,
    40960,
    "qwen2.jinja",
    generation={**_ENDS, "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
)

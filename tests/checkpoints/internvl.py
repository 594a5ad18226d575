"""InternVL3 in Hugging Face's form."""

from __future__ import annotations

import transformers

from tests.checkpoints.parts import BICUBIC, IMAGENET, text_model
from tests.checkpoints.spec import SPREAD, Checkpoint, Ids, TokenizerSpec


def _internvl(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "attention_bias": True,
        "initializer_range": SPREAD,
    }
    text = text_model(entries, 32768, model_type="qwen2", rms_norm_eps=1e-6, eos_token_id=ids("<|im_end|>"))
    return transformers.InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=ids("<IMG_CONTEXT>"), image_seq_length=256
    )


INTERNVL = Checkpoint(
    "internvl",
    "InternVLForConditionalGeneration",
    TokenizerSpec(
        "bytes",
        last=(
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<img>",
            "</img>",
            "<IMG_CONTEXT>",
            "<quad>",
            "</quad>",
            "<ref>",
            "</ref>",
            "<box>",
            "</box>",
            "<video>",
        ),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        roles={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    _internvl,
    32768,
    "internvl.jinja",
    image_processor={
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "max_patches": 12,
        "min_patches": 1,
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": 448, "width": 448},
        **IMAGENET,
    },
    processor={"processor_class": "InternVLProcessor", "image_seq_length": 256},
    generation={"eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"},
)

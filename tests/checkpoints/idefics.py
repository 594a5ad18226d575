"""Idefics3, whose tile marks are plain text, and SmolVLM, where each is one token."""

from __future__ import annotations

import transformers

from tests.checkpoints.parts import HALF, LANCZOS, text_model, vision_model
from tests.checkpoints.spec import Checkpoint, Ids, TokenizerSpec

_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_PIXELS = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": LANCZOS,
    "rescale_factor": 1 / 255,
    **HALF,
}


def _idefics3(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    text = text_model(
        entries, 131072, model_type="llama", rms_norm_eps=1e-5, pad_token_id=ids("<|reserved_special_token_0|>")
    )
    return transformers.Idefics3Config(
        text_config=text,
        vision_config=vision_model(364, 14),
        image_token_id=ids("<image>"),
        pad_token_id=ids("<|reserved_special_token_0|>"),
        scale_factor=2,
    )


def _smolvlm(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    text = text_model(entries, 8192, model_type="llama", rms_norm_eps=1e-5, pad_token_id=ids("<|im_end|>"))
    return transformers.SmolVLMConfig(
        text_config=text,
        vision_config=vision_model(512, 16),
        image_token_id=ids("<image>"),
        pad_token_id=ids("<|im_end|>"),
        scale_factor=4,
    )


IDEFICS3 = Checkpoint(
    "idefics3",
    "Idefics3ForConditionalGeneration",
    TokenizerSpec(
        "bytes",
        last=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|reserved_special_token_0|>",
            "<|eot_id|>",
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
        ),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|reserved_special_token_0|>",
        add_bos=True,
    ),
    _idefics3,
    131072,
    "idefics3.jinja",
    image_processor={
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        "max_image_size": {"longest_edge": 364},
        "size": {"longest_edge": 4 * 364},
        **_PIXELS,
    },
    processor={"processor_class": "Idefics3Processor", "image_seq_len": 169},
    generation={
        "bos_token_id": "<|begin_of_text|>",
        "eos_token_id": ["<|end_of_text|>", "<|eot_id|>", "<end_of_utterance>"],
        "pad_token_id": "<|reserved_special_token_0|>",
    },
)
SMOLVLM = Checkpoint(
    "smolvlm",
    "SmolVLMForConditionalGeneration",
    TokenizerSpec(
        "bytes",
        first=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        last=("<global-img>", *_TILES, "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        unk="<|endoftext|>",
        roles={
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    ),
    _smolvlm,
    8192,
    "smolvlm.jinja",
    image_processor={
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
        "max_image_size": {"longest_edge": 512},
        "size": {"longest_edge": 2048},
        **_PIXELS,
    },
    processor={"processor_class": "SmolVLMProcessor", "image_seq_len": 64},
    generation={"bos_token_id": "<|im_start|>", "eos_token_id": "<end_of_utterance>", "pad_token_id": "<|im_end|>"},
)

"""LLaVA 1.5, LLaVA-NeXT (Mistral) and LLaVA-OneVision (Qwen2)."""

from __future__ import annotations

import torch
import transformers

from tests.checkpoints.parts import BICUBIC, CLIP, HALF, text_model, vision_model
from tests.checkpoints.spec import Checkpoint, Ids, TokenizerSpec

_PIXELS = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": BICUBIC}
_CLIP_PIXELS = {
    **_PIXELS,
    **CLIP,
    "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336},
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 336},
}
_NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_GRIDS = [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)]
_PROCESSOR = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
}


def _llava(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    text = text_model(entries, 4096, model_type="llama", rms_norm_eps=1e-5, pad_token_id=ids("<pad>"))
    vision = vision_model(336, 14, model_type="clip_vision_model", projection_dim=64, num_hidden_layers=3)
    return transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids("<image>"),
        image_seq_length=576,
    )


def _llava_next(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    text = text_model(entries, 32768, model_type="mistral", rms_norm_eps=1e-5, sliding_window=None)
    vision = vision_model(336, 14, model_type="clip_vision_model", projection_dim=64, num_hidden_layers=3)
    return transformers.LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids("<image>"),
        image_grid_pinpoints=_NEXT_GRIDS,
    )


def _llava_onevision(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    text = text_model(entries, 32768, model_type="qwen2", rms_norm_eps=1e-6, eos_token_id=ids("<|im_end|>"))
    vision = vision_model(384, 14, model_type="siglip_vision_model", vision_use_head=False)
    return transformers.LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=_ONEVISION_GRIDS,
    )


LLAVA = Checkpoint(
    "llava",
    "LlavaForConditionalGeneration",
    TokenizerSpec(
        "llama",
        first=("<unk>", "<s>", "</s>"),
        last=("<image>", "<pad>"),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        roles={"image_token": "<image>"},
        add_bos=True,
    ),
    _llava,
    4096,
    "llava.jinja",
    image_processor={
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **_CLIP_PIXELS,
    },
    processor={"processor_class": "LlavaProcessor", **_PROCESSOR},
    generation={"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"},
    dtype=torch.float16,
)
LLAVA_NEXT = Checkpoint(
    "llava_next",
    "LlavaNextForConditionalGeneration",
    TokenizerSpec(
        "llama",
        first=("<unk>", "<s>", "</s>"),
        last=("<image>", "<pad>"),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        roles={"image_token": "<image>"},
        add_bos=True,
    ),
    _llava_next,
    32768,
    "llava_next.jinja",
    image_processor={
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "aspect_ratio_setting": "anyres",
        "do_pad": True,
        "image_grid_pinpoints": _NEXT_GRIDS,
        **_CLIP_PIXELS,
    },
    processor={"processor_class": "LlavaNextProcessor", **_PROCESSOR},
    generation={"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"},
    dtype=torch.float16,
)
LLAVA_ONEVISION = Checkpoint(
    "llava_onevision",
    "LlavaOnevisionForConditionalGeneration",
    TokenizerSpec(
        "bytes",
        last=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        roles={"image_token": "<image>", "video_token": "<video>"},
    ),
    _llava_onevision,
    32768,
    "llava_onevision.jinja",
    image_processor={
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "do_pad": True,
        "image_grid_pinpoints": _ONEVISION_GRIDS,
        "rescale_factor": 1 / 255,
        "size": {"height": 384, "width": 384},
        **_PIXELS,
        **HALF,
    },
    processor={
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "num_image_tokens": 729,
        "video_token": "<video>",
        "vision_feature_select_strategy": "full",
    },
    generation={
        "bos_token_id": "<|endoftext|>",
        "eos_token_id": ["<|im_end|>", "<|endoftext|>"],
        "pad_token_id": "<|endoftext|>",
        "do_sample": True,
        "repetition_penalty": 1.1,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    },
    dtype=torch.float16,
)

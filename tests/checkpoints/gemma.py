"""Gemma 3 and PaliGemma."""

from __future__ import annotations

import transformers

from tests.checkpoints.parts import BICUBIC, BILINEAR, HALF, text_model, vision_model
from tests.checkpoints.spec import SPREAD, Checkpoint, Ids, TokenizerSpec

_BASE = ("<pad>", "<eos>", "<bos>", "<unk>")
_LOCATIONS = tuple(f"<loc{place:04d}>" for place in range(1024))
_SEGMENTS = tuple(f"<seg{part:03d}>" for part in range(128))
_PIXELS = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255}


def _gemma3(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    text = text_model(
        entries,
        131072,
        sliding_window=1024,
        query_pre_attn_scalar=32,
        bos_token_id=ids("<bos>"),
        eos_token_id=ids("<eos>"),
        pad_token_id=ids("<pad>"),
    )
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=vision_model(896, 14, vision_use_head=False),
        mm_tokens_per_image=256,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        initializer_range=SPREAD,
    )


def _paligemma(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    text = text_model(entries, 8192, model_type="gemma", hidden_activation="gelu_pytorch_tanh")
    return transformers.PaliGemmaConfig(
        text_config={**text, "num_image_tokens": 256, "pad_token_id": ids("<pad>")},
        vision_config=vision_model(224, 14, model_type="siglip_vision_model", vision_use_head=False, projection_dim=64),
        image_token_index=ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )


GEMMA3 = Checkpoint(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    TokenizerSpec(
        "gemma",
        first=_BASE,
        last=("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        roles={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        add_bos=True,
    ),
    _gemma3,
    131072,
    "gemma3.jinja",
    image_processor={
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "do_convert_rgb": None,
        "do_pan_and_scan": None,
        "image_seq_length": 256,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "resample": BILINEAR,
        "size": {"height": 896, "width": 896},
        **_PIXELS,
        **HALF,
    },
    processor={"processor_class": "Gemma3Processor", "image_seq_length": 256},
    generation={
        "bos_token_id": "<bos>",
        "eos_token_id": ["<eos>", "<end_of_turn>"],
        "pad_token_id": "<pad>",
        "do_sample": True,
        "top_k": 64,
        "top_p": 0.95,
    },
)
PALIGEMMA = Checkpoint(
    "paligemma",
    "PaliGemmaForConditionalGeneration",
    TokenizerSpec(
        "gemma",
        first=_BASE,
        last=(*_LOCATIONS, *_SEGMENTS, "<image>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        roles={"image_token": "<image>"},
        add_bos=True,
    ),
    _paligemma,
    8192,
    None,
    image_processor={
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "do_convert_rgb": None,
        "image_seq_length": 256,
        "resample": BICUBIC,
        "size": {"height": 224, "width": 224},
        **_PIXELS,
        **HALF,
    },
    generation={"bos_token_id": "<bos>", "eos_token_id": "<eos>", "pad_token_id": "<pad>"},
)

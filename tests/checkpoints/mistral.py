"""Pixtral and Mistral Small 3.1, in Hugging Face's form."""

from __future__ import annotations

import transformers

from tests.checkpoints.parts import BICUBIC, CLIP, text_model
from tests.checkpoints.spec import SPREAD, Checkpoint, Ids, TokenizerSpec

_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_TOKENIZER = TokenizerSpec("bytes", first=_SPECIAL, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>", add_bos=True)
_PIXELS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": BICUBIC,
    "rescale_factor": 1 / 255,
    **CLIP,
}
_MARKS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
_ENDS = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}


def _vision(image_size: int, patch_size: int) -> dict[str, object]:
    return {
        "model_type": "pixtral",
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": 64,
        "head_dim": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": SPREAD,
    }


def _pixtral(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    text = text_model(entries, 131072, model_type="mistral", rms_norm_eps=1e-5, sliding_window=None)
    return transformers.LlavaConfig(
        text_config=text,
        vision_config=_vision(1024, 16),
        image_token_index=ids("[IMG]"),
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _mistral3(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    text = text_model(entries, 131072, model_type="mistral", rms_norm_eps=1e-5, sliding_window=None)
    return transformers.Mistral3Config(
        text_config=text,
        vision_config=_vision(1540, 14),
        image_token_index=ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


PIXTRAL = Checkpoint(
    "pixtral",
    "LlavaForConditionalGeneration",
    _TOKENIZER,
    _pixtral,
    131072,
    "pixtral.jinja",
    image_processor={
        "image_processor_type": "PixtralImageProcessor",
        "processor_class": "PixtralProcessor",
        "patch_size": {"height": 16, "width": 16},
        "size": {"longest_edge": 1024},
        **_PIXELS,
    },
    processor={"processor_class": "PixtralProcessor", "patch_size": 16, **_MARKS},
    generation=_ENDS,
)
MISTRAL3 = Checkpoint(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    _TOKENIZER,
    _mistral3,
    131072,
    "mistral3.jinja",
    image_processor={
        "image_processor_type": "PixtralImageProcessorFast",
        "processor_class": "PixtralProcessor",
        "patch_size": 14,
        "size": {"longest_edge": 1540},
        **_PIXELS,
    },
    processor={"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2, **_MARKS},
    generation=_ENDS,
)

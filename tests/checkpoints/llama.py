"""Llama 3.1, without pictures."""

from __future__ import annotations

import transformers

from tests.checkpoints.parts import text_model
from tests.checkpoints.spec import Checkpoint, Ids, TokenizerSpec

_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip


def _llama(ids: Ids, entries: int) -> transformers.PreTrainedConfig:
    ends = [ids("<|end_of_text|>"), ids("<|eom_id|>"), ids("<|eot_id|>")]
    text = text_model(entries, 131072, rms_norm_eps=1e-5, bos_token_id=ids("<|begin_of_text|>"), eos_token_id=ends)
    return transformers.LlamaConfig(**text, tie_word_embeddings=True)


LLAMA = Checkpoint(
    "llama",
    "LlamaForCausalLM",
    TokenizerSpec("bytes", last=_SPECIAL, bos="<|begin_of_text|>", eos="<|eot_id|>", add_bos=True),
    _llama,
    131072,
    "llama3.jinja",
    generation={
        "bos_token_id": "<|begin_of_text|>",
        "eos_token_id": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    },
)

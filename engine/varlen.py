"""Attention of vision encoders over pictures and windows packed into one row, in one kernel.

Without it transformers calls attention once for every window of every layer. Needs CUDA and half precision.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

# Encoders pass the windows' bounds to implementations that have "flash" in their name.
VARLEN = "greenroom_flash_varlen"


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Full attention within each window.

    Args:
        query: [1, heads, tokens, head size]; key and value alike.
        cu_seq_lens_q: int32 [windows + 1], where each begins and the last one ends.

    Returns:
        [1, tokens, heads, head size].
    """
    queries, keys, values = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    bounds, longest = cu_seq_lens_q.to(torch.int32), int(max_length_q)
    out = varlen_attn(queries, keys, values, bounds, bounds, longest, longest, scale=scaling)
    return cast(torch.Tensor, out)[None], None


AttentionInterface.register(VARLEN, varlen_attention)

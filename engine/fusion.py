"""Norms in one kernel. Where few tokens are computed, launching a norm's seven kernels takes longer than they run."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import rms_norm

# Rounding: torch's kernel rounds once, Hugging Face's norms before the multiplication with the weight too.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class FusedRMSNorm(nn.Module):
    """The root-mean-square norm over the last dimension, with another norm's weight."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> int:
    """Replace norms that compute this, which is tried on each; return how many were replaced.

    Names and weights of the model's parameters stay.
    """
    found = [(parent, name, norm) for parent in model.modules() for name, norm in parent.named_children()]
    replaced = 0
    for parent, name, norm in found:
        fused = _fused(norm)
        if fused is not None:
            setattr(parent, name, fused)
            replaced += 1
    return replaced


def _fused(norm: nn.Module) -> FusedRMSNorm | None:
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or weight.dim() != 1:
        return None
    fused = FusedRMSNorm(weight, eps)
    generator = torch.Generator(weight.device).manual_seed(0)
    sample = torch.randn(4, len(weight), generator=generator, device=weight.device, dtype=weight.dtype)
    tolerance = _TOLERANCE.get(weight.dtype, 0.0)
    same = torch.allclose(norm(sample).float(), fused(sample).float(), rtol=tolerance, atol=tolerance)
    return fused if same else None

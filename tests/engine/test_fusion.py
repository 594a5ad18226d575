"""Norms are replaced where torch's kernel computes the same, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from engine.fusion import FusedRMSNorm, fuse_norms
from tests.checkpoints import checkpoint


def model_of(family: str) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(checkpoint(family))
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model: torch.nn.Module = auto.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    return model


def norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_every_norm_of_a_family_that_the_engine_runs_is_replaced(family: str) -> None:
    model = model_of(family)
    names, found = list(model.state_dict()), norms(model)
    assert fuse_norms(model) == len(found) > 0
    assert all(isinstance(norm, FusedRMSNorm) for norm in norms(model))
    assert list(model.state_dict()) == names


@torch.inference_mode()
def test_the_model_computes_what_it_did() -> None:
    model = model_of("qwen2")
    ids = torch.arange(20, 40)[None]
    before = model(input_ids=ids).logits
    fuse_norms(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_a_norm_that_computes_something_else_stays() -> None:
    model = model_of("gemma3")  # of its weights, one is added to each
    before = norms(model)
    assert fuse_norms(model) == 0
    assert norms(model) == before

"""Of every family: the answer to a render request says which tokens of each range carry embeddings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.answers.rendered import ItemCodec, render_answer
from deployments.calls import Envelope, RenderCall, SamplingRequest
from engine.protocol import SamplingParams
from renderer.embed_runs import embed_mask
from renderer.prompt import RenderedPrompt
from renderer.renderer import Renderer
from tests.checkpoints import IMAGE_FAMILIES
from tests.families.conftest import RendererOf
from tests.goldens.cases import chat, image, user

REQUEST = chat(user(image("rgb-640x480.jpg"), "?"))
# Others have tokens of their own in the range: newlines, row breaks, tile names, begin and end marks.
ALL_CARRY = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision"}


def features(renderer: Renderer, prompt: RenderedPrompt) -> dict[str, Any]:
    call = RenderCall(REQUEST, SamplingRequest(), Envelope("x"), skip_mm_cache=True, tensors=False)
    codec = ItemCodec(renderer.family.fields, renderer.float_type)
    written: dict[str, Any] = json.loads(
        b"".join(render_answer(call, [prompt], [SamplingParams(max_tokens=1)], codec))
    )["features"]
    return written


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_every_mask_is_in_the_answer(family: str, renderer_of: RendererOf) -> None:
    renderer = renderer_of(family)
    prompt = renderer.layout(REQUEST)
    written = features(renderer, prompt)
    assert (written["mm_embed_runs"] is None) == (family in ALL_CARRY)
    if written["mm_embed_runs"] is not None:
        masks = [
            embed_mask(runs, place["length"])
            for runs, place in zip(written["mm_embed_runs"]["image"], written["mm_placeholders"]["image"], strict=True)
        ]
        assert masks == [item.range.embed_mask for item in prompt.items]

"""Of every family: each token of a prompt has its place in the text, in order, and truncation takes both alike."""

from __future__ import annotations

from typing import Any

import pytest

from renderer.conversation import CompletionRequest
from renderer.offsets import token_offsets
from tests.checkpoints import FAMILIES
from tests.families.conftest import RendererOf
from tests.goldens.cases import chat, user

TEXT = "Größe? 日本 😀 It is  a disc.\n\n Well"
TRUNCATIONS: list[dict[str, Any]] = [
    {},
    {"truncate_prompt_tokens": 5},
    {"truncate_prompt_tokens": 5, "truncation_side": "left"},
    {"truncate_prompt_tokens": 5, "truncation_side": "right"},
    {"truncate_prompt_tokens": -1},
]


@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_stands_where_its_text_is(family: str, options: dict[str, Any], renderer_of: RendererOf) -> None:
    renderer = renderer_of(family)
    for special in (True, False):
        asked = chat(user(TEXT), add_special_tokens=special, **options)
        completion = CompletionRequest((TEXT, (5, 6)), add_special_tokens=special, **options)
        (places,), texts = token_offsets(renderer, asked), token_offsets(renderer, completion)
        prompts = renderer.render_completion(completion, skip_mm_cache=True)
        assert texts[1] is None
        for found, prompt, text in (
            (places, renderer.layout(asked), renderer.text(asked)),
            (texts[0], prompts[0], TEXT),
        ):
            assert found is not None
            assert len(found) == len(prompt.token_ids)
            inside = [place for place in found if place != (0, 0)]
            assert all(start <= end <= len(text) for start, end in inside)
            assert inside == sorted(inside)

"""What is rendered is what the peer renders: token ids, ranges, hashes, tensors, refusals, case by case.

`tests/goldens` holds the cases and the peer's recorded answers.
"""

from __future__ import annotations

from typing import Any

import pytest

from renderer.conversation import ChatRequest
from renderer.errors import RequestError
from renderer.prompt import PlaceholderRange, RenderedPrompt
from renderer.renderer import Renderer
from tests.checkpoints import FAMILIES
from tests.families.conftest import RendererOf
from tests.goldens.cases import Case, cases
from tests.goldens.files import golden, unpack_ids

# A text that spells a placeholder is refused: it never takes an image's place, nor leaves one without an image.
SPELLED = ("a text that spells the placeholder", "a text that spells the placeholder beside an image")
# A role that neither the API nor the template knows: the peer hands it to the template as it is.
UNKNOWN_ROLE = "an unknown role"
# Images that touch: the peer counts their tokens and cannot render them.
TOUCHING = ("two images", "three images among texts", "eight images", "numbered images")
# The peer knows no placeholder text for them, or loses an image that one newline follows.
PLACED_BY_US = [(family, "images for a template of strings") for family in ("gemma3", "pixtral", "mistral3")]
# The peer counts the tokens of an image as if the request had no options.
OPTIONS_COUNTED = [("pixtral", "options 0 rgb-1280x720.jpg"), ("pixtral", "options 0 rgb-300x2000.jpg")]

RECORDED = [(family, name, answer) for family in FAMILIES for name, answer in golden(family)["cases"].items()]


def differs(family: str, name: str) -> bool:
    """Whether we differ from the peer on purpose."""
    touching = family == "gemma3" and name in TOUCHING
    return name in (*SPELLED, UNKNOWN_ROLE) or touching or (family, name) in (*PLACED_BY_US, *OPTIONS_COUNTED)


CASES = [(f, n, answer["status"] == 200) for f, n, answer in RECORDED if not differs(f, n)]
# Those with tensors are rendered in `test_tensors.py`.
LAID_OUT = [
    pytest.param(family, name, id=f"{family}: {name}")
    for family, name, answered in CASES
    if answered and "items" not in golden(family)["cases"][name]["prompts"][0]
]
REFUSED = [pytest.param(f, n, id=f"{f}: {n}") for f, n, answered in CASES if not answered]
SPELLING = [(family, name) for family, name, _ in RECORDED if name in SPELLED]


def answer_of(family: str, name: str) -> Any:
    return golden(family)["cases"][name]


def layouts(renderer: Renderer, case: Case) -> list[RenderedPrompt]:
    if isinstance(case.request, ChatRequest):
        return [renderer.layout(case.request)]
    return list(renderer.render_completion(case.request, skip_mm_cache=True))


def embeds(place: PlaceholderRange) -> list[int]:
    mask = place.embed_mask or (True,) * place.length
    return [place.offset + step for step, carries in enumerate(mask) if carries]


def assert_is_the_peers(prompt: RenderedPrompt, expected: Any) -> None:
    assert list(prompt.token_ids) == unpack_ids(expected["token_ids"])
    assert [[item.range.offset, item.range.length] for item in prompt.items] == expected.get("ranges", [])
    assert [item.mm_hash for item in prompt.items] == expected.get("hashes", [])


@pytest.mark.parametrize(("family", "name"), LAID_OUT)
def test_the_layout_is_the_peers(family: str, name: str, renderer_of: RendererOf) -> None:
    prompts = layouts(renderer_of(family), cases(family)[name])
    for prompt, expected in zip(prompts, answer_of(family, name)["prompts"], strict=True):
        assert_is_the_peers(prompt, expected)


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_the_peer_refuses_is_refused(family: str, name: str, renderer_of: RendererOf) -> None:
    request = cases(family)[name].request
    assert isinstance(request, ChatRequest)
    with pytest.raises(RequestError) as refusal:
        renderer_of(family).render_chat(request, skip_mm_cache=True)
    assert refusal.value.status == 400


@pytest.mark.parametrize(("family", "name"), SPELLING)
def test_a_text_that_spells_a_placeholder_is_refused(family: str, name: str, renderer_of: RendererOf) -> None:
    with pytest.raises(RequestError, match=r"placeholder|stands for media"):
        layouts(renderer_of(family), cases(family)[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_role_is_refused(family: str, renderer_of: RendererOf) -> None:
    with pytest.raises(RequestError) as refusal:
        layouts(renderer_of(family), cases(family)[UNKNOWN_ROLE])
    assert (refusal.value.status, refusal.value.param) == (400, "messages.0.role")


@pytest.mark.parametrize("name", TOUCHING)
def test_images_of_gemma_that_touch_have_the_tokens_that_the_peer_counts(name: str, renderer_of: RendererOf) -> None:
    renderer = renderer_of("gemma3")
    (prompt,) = layouts(renderer, cases("gemma3")[name])
    assert list(prompt.token_ids) == unpack_ids(answer_of("gemma3", name)["tokenize"])
    four_newlines = renderer.tokenizer.id_of("\n" * 4)
    for before, after in zip(prompt.items, prompt.items[1:], strict=False):
        touches = before.range.end == after.range.offset
        assert (prompt.token_ids[before.range.end - 1] == four_newlines) == touches
    assert all(item.range.num_embeds == 256 for item in prompt.items)


@pytest.mark.parametrize(("family", "name"), PLACED_BY_US)
def test_images_find_their_place_in_a_template_of_strings(family: str, name: str, renderer_of: RendererOf) -> None:
    renderer = renderer_of(family)
    (prompt,) = layouts(renderer, cases(family)[name])
    soft = renderer.tokenizer.id_of("<image_soft_token>" if family == "gemma3" else "[IMG]")
    carriers = [place for place, token_id in enumerate(prompt.token_ids) if token_id == soft]
    assert carriers == [place for item in prompt.items for place in embeds(item.range)]


@pytest.mark.parametrize(("family", "name"), OPTIONS_COUNTED)
def test_tokens_are_counted_under_the_options_of_the_request(family: str, name: str, renderer_of: RendererOf) -> None:
    request = cases(family)[name].request
    assert isinstance(request, ChatRequest)
    (item,) = renderer_of(family).render_chat(request, skip_mm_cache=True).items
    assert item.tensors is not None
    _, height, width = item.tensors["pixel_values"].shape
    assert item.range.num_embeds == height // 16 * (width // 16)
    (recorded,) = answer_of(family, name)["prompts"][0]["items"]
    assert recorded["pixel_values"]["shape"] == [3, height, width]

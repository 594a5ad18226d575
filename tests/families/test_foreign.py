"""Of every family: items that arrive processed are those that were rendered, and what an engine could not take is
refused before it gets there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from renderer.caches import SenderCache
from renderer.conversation import FeatureItem, FeaturesRequest
from renderer.errors import CacheMissError, RequestError
from renderer.family import Field
from renderer.foreign import receive
from renderer.hashing import foreign_key
from renderer.prompt import PlaceholderRange, RenderedPrompt
from renderer.renderer import Renderer
from renderer.wire import encode_item
from tests.checkpoints import IMAGE_FAMILIES
from tests.families.conftest import RendererOf
from tests.goldens.cases import chat, image, user

SMALL = "rgb-97x61.png"
NAMES = ("rgb-640x480.jpg", SMALL, "rgb-300x2000.jpg")
ONE_SIZE = {"llava", "gemma3", "paligemma"}


def rendered(renderer: Renderer, *names: str) -> RenderedPrompt:
    parts = [part for name in names for part in (image(name), "and")]
    return renderer.render_chat(chat(user(*parts, "?")), skip_mm_cache=True)


def features(renderer: Renderer, prompt: RenderedPrompt, masks: bool = True) -> FeaturesRequest:
    """The prompt as it comes over the wire."""
    items = tuple(
        FeatureItem(
            item.mm_hash,
            item.range if masks else PlaceholderRange(item.range.offset, item.range.length),
            encode_item(item.tensors or {}, renderer.family.fields, renderer.float_type),
        )
        for item in prompt.items
    )
    return FeaturesRequest(prompt.token_ids, items, prompt.cache_salt)


def names(renderer: Renderer) -> tuple[str, ...]:
    return NAMES[: renderer.family.max_items or len(NAMES)]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_what_was_rendered_is_what_arrives(family: str, masks: bool, renderer_of: RendererOf) -> None:
    renderer = renderer_of(family)
    prompt = rendered(renderer, *names(renderer))
    got = renderer.receive(features(renderer, prompt, masks))
    assert got.token_ids == prompt.token_ids
    for ours, theirs in zip(got.items, prompt.items, strict=True):
        assert ours.range.num_embeds == theirs.range.num_embeds
        assert ours.mm_hash == theirs.mm_hash
        assert ours.cache_key != theirs.cache_key
        assert ours.tensors is not None
        assert theirs.tensors is not None
        for name, tensor in theirs.tensors.items():
            # Floats travel in the checkpoint's own half.
            exact = tensor.dtype != np.float32
            assert np.allclose(ours.tensors[name], tensor, rtol=0 if exact else 2**-8, atol=0)


@pytest.mark.parametrize("masks", [True, False])
def test_images_of_gemma_that_touch_arrive_as_they_were_rendered(masks: bool, renderer_of: RendererOf) -> None:
    renderer = renderer_of("gemma3")
    prompt = renderer.render_chat(chat(user(image(NAMES[0]), image(SMALL))), skip_mm_cache=True)
    assert prompt.items[0].range.end == prompt.items[1].range.offset
    got = renderer.receive(features(renderer, prompt, masks))
    assert got.token_ids == prompt.token_ids
    for ours, theirs in zip(got.items, prompt.items, strict=True):
        assert (ours.range.offset, ours.range.length) == (theirs.range.offset, theirs.range.length)
        assert ours.range.embed_mask == theirs.range.embed_mask
        assert ours.tensors is not None


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_arrays_arrive_as_they_are(family: str, renderer_of: RendererOf) -> None:
    renderer = renderer_of(family)
    prompt = rendered(renderer, SMALL)
    (item,) = prompt.items
    request = FeaturesRequest(prompt.token_ids, (FeatureItem("mine", item.range, item.tensors),))
    (got,) = renderer.receive(request).items
    assert got.tensors is not None
    assert item.tensors is not None
    assert all(got.tensors[name] is item.tensors[name] for name in item.tensors)


Change = Callable[[dict[str, Any]], dict[str, Any]]


def with_pixels(change: Callable[[Any], Any]) -> Change:
    return lambda tensors: tensors | {"pixel_values": change(tensors["pixel_values"])}


def first_number(value: float) -> Callable[[Any], Any]:
    def change(pixels: Any) -> Any:
        floats = np.array(pixels, dtype=np.float32)
        floats.reshape(-1)[0] = value
        return floats

    return change


FAULTS: dict[str, Change] = {
    "another dtype": with_pixels(lambda pixels: pixels.astype(np.int32)),
    "doubles": with_pixels(lambda pixels: pixels.astype(np.float64)),
    "a row too few": with_pixels(lambda pixels: pixels[:-1]),
    "a row too many": with_pixels(lambda pixels: np.concatenate([pixels, pixels[:1]])),
    "nothing": with_pixels(lambda pixels: pixels[:0]),
    "a dimension more": with_pixels(lambda pixels: pixels[None]),
    "a column too few": with_pixels(lambda pixels: pixels[..., :-1]),
    "not a number": with_pixels(first_number(np.nan)),
    "infinite": with_pixels(first_number(np.inf)),
    "beyond all pixels": with_pixels(first_number(1e6)),
    "a tensor more": lambda tensors: tensors | {"more": np.zeros(1, np.float32)},
    "no pixels": lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "pixel_values"},
    "short whole numbers": lambda tensors: {name: tensor.astype(np.int32) for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_tensors_that_no_image_makes_are_refused(family: str, fault: str, renderer_of: RendererOf) -> None:
    renderer = renderer_of(family)
    prompt = rendered(renderer, SMALL)
    (item,) = prompt.items
    broken = FAULTS[fault](dict(item.tensors or {}))
    with pytest.raises(RequestError, match="item 0"):
        renderer.receive(FeaturesRequest(prompt.token_ids, (FeatureItem("mine", item.range, broken),)))


@pytest.mark.parametrize("family", [family for family in IMAGE_FAMILIES if family not in ONE_SIZE])
def test_tensors_of_another_image_are_refused_where_they_make_other_tokens(
    family: str, renderer_of: RendererOf
) -> None:
    renderer = renderer_of(family)
    (small,), (large,) = (rendered(renderer, name).items for name in NAMES[1:])
    request = FeaturesRequest(rendered(renderer, SMALL).token_ids, (FeatureItem("mine", small.range, large.tensors),))
    with pytest.raises(RequestError, match="embeddings"):
        renderer.receive(request)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_fields_of_another_kind_are_refused(family: str, renderer_of: RendererOf) -> None:
    renderer = renderer_of(family)
    prompt = rendered(renderer, SMALL)
    (item,) = prompt.items
    for name, field in renderer.family.fields.items():
        fields = dict(renderer.family.fields) | {name: Field("batched" if field.kind != "batched" else "flat")}
        if item.tensors is None or item.tensors[name].ndim == 0:
            continue
        data = encode_item(item.tensors, fields, renderer.float_type)
        with pytest.raises(RequestError, match=name):
            renderer.receive(FeaturesRequest(prompt.token_ids, (FeatureItem("mine", item.range, data),)))


PLACES: dict[str, Callable[[FeaturesRequest], FeaturesRequest]] = {
    "beyond the prompt": lambda request: moved(request, 0, len(request.token_ids)),
    "one token later": lambda request: moved(request, 0, request.items[0].range.offset + 1),
    "overlapping": lambda request: moved(request, 1, request.items[0].range.end - 1),
    "out of order": lambda request: dataclasses.replace(request, items=request.items[::-1]),
    "an item too few": lambda request: dataclasses.replace(request, items=request.items[:1]),
    "a negative token": lambda request: dataclasses.replace(request, token_ids=(*request.token_ids, -1)),
    "no name": lambda request: dataclasses.replace(
        request, items=(dataclasses.replace(request.items[0], mm_hash=""), *request.items[1:])
    ),
    "a name without end": lambda request: dataclasses.replace(
        request, items=(dataclasses.replace(request.items[0], mm_hash="x" * 4096), *request.items[1:])
    ),
    "another mask": lambda request: dataclasses.replace(
        request,
        items=(
            dataclasses.replace(
                request.items[0],
                range=dataclasses.replace(
                    request.items[0].range, embed_mask=(True,) + (False,) * (request.items[0].range.length - 1)
                ),
            ),
            *request.items[1:],
        ),
    ),
    "a bad salt": lambda request: dataclasses.replace(request, cache_salt="a/b"),
}


def moved(request: FeaturesRequest, index: int, offset: int) -> FeaturesRequest:
    item = request.items[index]
    place = dataclasses.replace(item.range, offset=offset)
    items = list(request.items)
    items[index] = dataclasses.replace(item, range=place)
    return dataclasses.replace(request, items=tuple(items))


@pytest.mark.parametrize("fault", PLACES)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "pixtral", "gemma3"])
def test_items_that_stand_elsewhere_are_refused(family: str, fault: str, renderer_of: RendererOf) -> None:
    renderer = renderer_of(family)
    request = features(renderer, rendered(renderer, *NAMES[:2]))
    with pytest.raises(RequestError):
        renderer.receive(PLACES[fault](request))


def test_an_item_is_known_by_its_claim_its_tenant_and_its_tokens(renderer_of: RendererOf) -> None:
    renderer = renderer_of("qwen2_5_vl")
    family, cache = renderer.family, SenderCache(2**24)
    request = features(renderer, rendered(renderer, SMALL))
    first = receive(request, family, cache)
    cache.commit(first.items)
    assert first.items[0].cache_key == foreign_key(None, first.items[0].mm_hash, first.items[0].range.num_embeds)
    null = dataclasses.replace(request, items=(dataclasses.replace(request.items[0], data=None),))
    again = receive(null, family, cache)
    assert again.items[0].tensors is None
    cache.commit(again.items)
    with pytest.raises(CacheMissError):
        receive(dataclasses.replace(null, cache_salt="other"), family, cache)
    assert cache.stats.pinned == 1
    for prompt in (first, again):
        assert prompt.lease is not None
        prompt.lease.close()
    assert cache.stats.pinned == 0


def test_data_that_came_stays_with_the_request_whatever_the_engine_holds(renderer_of: RendererOf) -> None:
    renderer = renderer_of("qwen2_5_vl")
    cache = SenderCache(2**24)
    request = features(renderer, rendered(renderer, SMALL))
    first = receive(request, renderer.family, cache)
    assert cache.commit(first.items).items[0].tensors is not None
    again = receive(request, renderer.family, cache)
    assert cache.commit(again.items).items[0].tensors is None, "it is held"
    cache.reset()
    assert cache.commit(again.items).items[0].tensors is not None, "it is no more"


def test_a_claim_of_content_never_answers_for_content(renderer_of: RendererOf) -> None:
    renderer = renderer_of("qwen2_5_vl")
    cache = SenderCache(2**24)
    content = rendered(renderer, SMALL)
    cache.commit(content.items)
    assert cache.keys() == (content.items[0].cache_key,)
    request = features(renderer, content)
    null = dataclasses.replace(request, items=(dataclasses.replace(request.items[0], data=None),))
    with pytest.raises(CacheMissError):
        receive(null, renderer.family, cache)
    with pytest.raises(CacheMissError):
        receive(null, renderer.family, None)


def test_an_item_twice_in_a_request_needs_its_data_once(renderer_of: RendererOf) -> None:
    renderer = renderer_of("qwen2_5_vl")
    request = features(renderer, rendered(renderer, SMALL, SMALL))
    request = dataclasses.replace(request, items=(request.items[0], dataclasses.replace(request.items[1], data=None)))
    cache = SenderCache(2**24)
    submission = cache.commit(receive(request, renderer.family, cache).items)
    assert [item.tensors is None for item in submission.items] == [False, True]


def test_a_text_model_takes_no_items(renderer_of: RendererOf) -> None:
    renderer = renderer_of("qwen2")
    request = FeaturesRequest((5, 6, 7), (FeatureItem("mine", PlaceholderRange(1, 1), None),))
    with pytest.raises(RequestError):
        renderer.receive(request)
    assert renderer.receive(FeaturesRequest((5, 6, 7), ())).token_ids == (5, 6, 7)

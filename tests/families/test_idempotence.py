"""Of every family: a request gives the same prompt whatever was rendered before, after or beside it, whatever is
cached, and however it is asked: as a chat, or as token ids with its images."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from renderer.caches import SenderCache
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, TokensRequest, media_of
from renderer.prompt import RenderedPrompt
from renderer.renderer import Renderer
from tests.checkpoints import FAMILIES, IMAGE_FAMILIES, checkpoint
from tests.families.conftest import USUAL, RendererOf
from tests.goldens.cases import chat, image, user

TIMES = 5
CACHED = 1 << 29
SMALL, OTHER, WIDE = "rgb-97x61.png", "rgb-320x240.jpg", "rgb-1000x20.png"


def render(renderer: Renderer, request: ChatRequest) -> RenderedPrompt:
    return renderer.render_chat(request, skip_mm_cache=True)


def usual_request(renderer: Renderer) -> ChatRequest:
    """Two images among texts, as far as the family takes them."""
    if not renderer.modalities:
        return chat(user("Which colour?"))
    if renderer.family.max_items == 1:
        return chat(user("A ", image(OTHER), " and B"))
    return chat(user("A ", image(OTHER), " and B ", image(SMALL), "?"))


def other_requests(renderer: Renderer) -> list[ChatRequest]:
    """What shares images with the usual request, and what does not."""
    if not renderer.modalities:
        return [chat(user("And which size?")), chat(user("Why?"))]
    return [chat(user(image(SMALL), "Which colour?")), chat(user("Wide?", image(WIDE)))]


def same(left: RenderedPrompt, right: RenderedPrompt) -> bool:
    if left.layout() != right.layout():
        return False
    return all(
        one.tensors is not None
        and other.tensors is not None
        and one.tensors.keys() == other.tensors.keys()
        and all(np.array_equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        for one, other in zip(left.items, right.items, strict=True)
    )


@pytest.mark.parametrize("cache_bytes", [0, CACHED])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_rendered_five_times_alone_and_five_times_beside_others_is_the_same(
    family: str, cache_bytes: int, renderer_of: RendererOf
) -> None:
    renderer = renderer_of(family, processor_cache_bytes=cache_bytes)
    request, others = usual_request(renderer), other_requests(renderer)
    first = render(renderer_of(family), request)
    assert all(same(first, render(renderer, request)) for _ in range(TIMES))
    renderer.clear_mm_cache()
    with ThreadPoolExecutor(4) as pool:
        beside = [each for _ in range(TIMES) for each in (request, *others)]
        prompts = list(pool.map(lambda each: render(renderer, each), beside))
    assert all(same(first, prompt) for prompt in prompts[:: 1 + len(others)])
    cache = renderer.readonly_mm_processor.cache
    assert (cache is not None and cache.stats.hits > 0) == bool(cache_bytes and first.items)


@contextmanager
def beside_an_engine(family: str) -> Iterator[tuple[Renderer, SenderCache]]:
    cache = SenderCache(CACHED)
    config = RendererConfig.model_validate({"model": family, **USUAL})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkpoint(family).parent)
        renderer = Renderer(config, cache)
    try:
        yield renderer, cache
    finally:
        renderer.close()


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_beside_an_engine_only_the_tensors_that_it_holds_are_missing(family: str, renderer_of: RendererOf) -> None:
    request = usual_request(renderer_of(family))
    expected = render(renderer_of(family), request)
    with beside_an_engine(family) as (renderer, cache):
        for time in range(TIMES):
            for other in (request, *other_requests(renderer)):
                prompt = renderer.render_chat(other)
                assert prompt.lease is not None
                with prompt.lease:
                    submission = cache.commit(prompt.items)
                if other is request:
                    assert prompt.layout() == expected.layout()
                    assert same(expected, prompt) == (time == 0)
                    assert all(item.tensors is None for item in submission.items) == (time > 0)


@pytest.mark.parametrize("family", [family for family in IMAGE_FAMILIES if family != "paligemma"])
def test_an_image_among_others_is_what_it_is_alone(family: str, renderer_of: RendererOf) -> None:
    names = (WIDE, "rgb-640x480.jpg", SMALL)
    renderer = renderer_of(family)
    together = render(renderer, chat(user(*(word for name in names for word in (image(name), "and")))))
    for name, item in zip(names, together.items, strict=True):
        (alone,) = render(renderer, chat(user(image(name)))).items
        assert item.tensors is not None
        assert alone.tensors is not None
        assert item.mm_hash == alone.mm_hash
        assert all(np.array_equal(item.tensors[key], alone.tensors[key]) for key in alone.tensors)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_token_ids_with_placeholders_and_images_are_the_chat_that_they_come_from(
    family: str, renderer_of: RendererOf
) -> None:
    renderer = renderer_of(family)
    request = usual_request(renderer)
    ids = tuple(renderer.tokenizer.encode(renderer.text(request), False))
    tokens = TokensRequest(ids, media_of(request))
    prompt = renderer.render_tokens(tokens, skip_mm_cache=True)
    assert same(render(renderer, request), prompt)
    assert prompt.layout() == renderer.layout(tokens)


def test_images_of_gemma_that_touch_are_what_they_are_apart(renderer_of: RendererOf) -> None:
    renderer = renderer_of("gemma3")
    request = chat(user(image(OTHER), image(SMALL), image(OTHER)))
    prompt = render(renderer, request)
    assert prompt.layout() == renderer.layout(request)
    assert [item.range.end for item in prompt.items[:-1]] == [item.range.offset for item in prompt.items[1:]]
    apart = render(renderer, chat(user(image(OTHER), "and", image(SMALL), "and", image(OTHER))))
    for item, alone in zip(prompt.items, apart.items, strict=True):
        assert item.tensors is not None
        assert alone.tensors is not None
        assert item.mm_hash == alone.mm_hash
        assert item.range.num_embeds == alone.range.num_embeds
        assert all(np.array_equal(item.tensors[key], alone.tensors[key]) for key in alone.tensors)

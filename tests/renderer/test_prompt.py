"""A prompt cannot hold ranges that no engine could use."""

import numpy as np
import pytest

from renderer.caches import SenderCache
from renderer.prompt import PlaceholderRange, PromptItem, RenderedPrompt


def item(offset: int, length: int, mask: tuple[bool, ...] | None = None) -> PromptItem:
    return PromptItem("hash", "key", PlaceholderRange(offset, length, mask), {"pixels": np.zeros((2, 3), np.uint8)})


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, 0), (3, -1)])
def test_a_range_has_a_place_and_a_length(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="offset >= 0 and length > 0"):
        PlaceholderRange(offset, length)


def test_a_mask_is_as_long_as_its_range() -> None:
    with pytest.raises(ValueError, match="2 entries for 3 tokens"):
        PlaceholderRange(0, 3, (True, False))


@pytest.mark.parametrize("places", [[(0, 3), (2, 2)], [(4, 1), (0, 2)], [(0, 9)], [(7, 2)]])
def test_ranges_are_in_order_disjoint_and_inside_the_prompt(places: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="range"):
        RenderedPrompt(tuple(range(8)), tuple(item(*place) for place in places))


def test_ranges_may_touch() -> None:
    assert len(RenderedPrompt(tuple(range(8)), (item(0, 3), item(3, 5))).items) == 2


def test_the_mask_tells_how_many_embeddings_there_are() -> None:
    assert PlaceholderRange(0, 4, (False, True, True, False)).num_embeds == 2
    assert PlaceholderRange(0, 4).num_embeds == 4


def test_a_layout_has_neither_tensors_nor_lease() -> None:
    prompt = RenderedPrompt((1, 2, 3), (item(1, 2),), "salt", SenderCache(10).lease())
    layout = prompt.layout()
    assert layout.items[0].tensors is None
    assert layout.lease is None
    assert (layout.token_ids, layout.cache_salt) == (prompt.token_ids, prompt.cache_salt)
    assert prompt.without_lease().items == prompt.items
    assert prompt.items[0].nbytes == 6

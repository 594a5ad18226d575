"""One placeholder an item, expanded in place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from renderer.errors import RequestError
from renderer.placeholders import Replacement, expand
from renderer.prompt import PlaceholderRange

IMAGE = 9


@pytest.mark.parametrize(
    ("ids", "lengths", "expected", "offsets"),
    [
        ([1, 9, 2], [3], [1, 9, 9, 9, 2], [1]),
        ([9, 9], [1, 2], [9, 9, 9], [0, 1]),
        ([9, 5, 9], [2, 1], [9, 9, 5, 9], [0, 3]),
        ([1, 2], [], [1, 2], []),
        ([9], [4], [9, 9, 9, 9], [0]),
    ],
)
def test_each_placeholder_becomes_its_items_tokens(
    ids: list[int], lengths: list[int], expected: list[int], offsets: list[int]
) -> None:
    expanded, ranges = expand(ids, IMAGE, [Replacement((IMAGE,) * length) for length in lengths], "messages")
    assert expanded == expected
    assert [place.offset for place in ranges] == offsets
    assert [place.length for place in ranges] == lengths


def test_a_replacement_keeps_its_other_tokens_and_its_mask() -> None:
    replacement = Replacement((7, IMAGE, IMAGE, 8), (False, True, True, False))
    expanded, ranges = expand([1, IMAGE, 2], IMAGE, [replacement], "messages")
    assert expanded == [1, 7, IMAGE, IMAGE, 8, 2]
    assert ranges == (PlaceholderRange(1, 4, (False, True, True, False)),)
    assert ranges[0].num_embeds == 2


@pytest.mark.parametrize(("ids", "items"), [([1, 9, 9], 1), ([1], 1), ([9], 0), ([9], 2)])
def test_as_many_placeholders_as_items_or_the_request_is_refused(ids: list[int], items: int) -> None:
    with pytest.raises(RequestError, match=f"{ids.count(9)} image placeholders for {items} images") as caught:
        expand(ids, IMAGE, [Replacement((IMAGE,))] * items, "prompt")
    assert caught.value.param == "prompt"


def test_a_model_without_placeholders_takes_any_token() -> None:
    assert expand([1, 9, 2], None, [], "messages") == ([1, 9, 2], ())


@given(st.lists(st.sampled_from([1, 2, IMAGE])), st.data())
def test_outside_the_ranges_nothing_changes(ids: list[int], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=ids.count(IMAGE), max_size=ids.count(IMAGE)))
    expanded, ranges = expand(ids, IMAGE, [Replacement((IMAGE,) * length) for length in lengths], "messages")
    for place in reversed(ranges):
        assert expanded[place.offset : place.end] == [IMAGE] * place.length
        expanded[place.offset : place.end] = [IMAGE]
    assert expanded == ids

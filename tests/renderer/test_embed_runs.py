"""Masks on the wire: what is written is read, and nothing else."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from renderer.embed_runs import embed_mask, embed_runs
from renderer.errors import RequestError


@pytest.mark.parametrize(
    ("mask", "runs"),
    [
        (None, None),
        ((True, True), None),
        ((False, True, True, False, True), [[1, 2], [4, 1]]),
        ((True, False), [[0, 1]]),
    ],
)
def test_a_mask_is_its_runs(mask: Any, runs: Any) -> None:
    assert embed_runs(mask) == runs


@given(st.lists(st.booleans(), min_size=1, max_size=200).filter(any))
def test_what_is_written_is_read(mask: list[bool]) -> None:
    expected = None if all(mask) else tuple(mask)
    assert embed_mask(embed_runs(mask), len(mask)) == expected


@pytest.mark.parametrize(
    "runs",
    [
        [],
        {},
        "1",
        [1],
        [[0]],
        [[0, 1, 2]],
        [[0, True]],
        [[0, 1.0]],
        [["0", 1]],
        [[-1, 2]],
        [[0, 0]],
        [[0, 11]],
        [[10, 1]],
        [[0, 2], [2, 2]],
        [[0, 2], [1, 2]],
        [[4, 2], [0, 1]],
        [[0, 10]],
        [[0, 10**30]],
        [[10**30, 1]],
    ],
)
def test_anything_else_is_the_callers_fault(runs: Any) -> None:
    with pytest.raises(RequestError, match="mm_embed_runs") as refused:
        embed_mask(runs, 10)
    assert refused.value.param == "features"


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)),
    st.integers(1, 50),
)
def test_any_json_is_read_or_refused(runs: Any, length: int) -> None:
    try:
        mask = embed_mask(runs, length)
    except RequestError:
        return
    assert mask is None or len(mask) == length

"""Text comes whole, in the same pieces whatever the grouping, and ends where a stop string says."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from renderer.detokenizer import IncrementalDetokenizer
from renderer.tokenizer import Tokenizer
from tests.checkpoints import checkpoint
from tests.renderer.test_tokenizer import tokenizer

BYTE_LEVEL = tokenizer()
VOCABULARY = 768


def sentence_piece() -> Tokenizer:
    return tokenizer(str(checkpoint("llava")))


def pieces(ids: Sequence[int], own: Tokenizer = BYTE_LEVEL, **options: Any) -> list[str]:
    """The text after each token, and at the end."""
    detokenizer = IncrementalDetokenizer(own, **options)
    return [*(detokenizer.feed([token_id]) for token_id in ids), detokenizer.finish()]


def grouped(ids: Sequence[int], cuts: Sequence[int], own: Tokenizer, **options: Any) -> tuple[str, str | None, int]:
    """Text, stop reason and tokens taken when tokens come in groups that end at `cuts`."""
    detokenizer = IncrementalDetokenizer(own, **options)
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    text = "".join(detokenizer.feed(ids[start:end]) for start, end in itertools.pairwise(edges))
    return text + detokenizer.finish(), detokenizer.stop_reason, detokenizer.num_tokens


@given(st.text(max_size=60))
def test_the_pieces_make_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, False)
    assert "".join(pieces(ids, skip_special_tokens=False)) == text


@given(st.text(max_size=40))
def test_the_pieces_of_a_sentencepiece_tokenizer_make_its_text(text: str) -> None:
    own = sentence_piece()
    ids = own.encode(text, False)
    assert "".join(pieces(ids, own)) == own.decode(ids, skip_special_tokens=True)


@given(
    st.lists(st.integers(0, VOCABULARY + 5), max_size=60),
    st.lists(st.integers(0, 100), max_size=6),
    st.lists(st.text("abe t.é", min_size=1, max_size=4), max_size=3),
    st.booleans(),
    st.integers(0, 20),
)
def test_grouping_changes_nothing(
    ids: list[int], cuts: list[int], stop: list[str], include: bool, min_tokens: int
) -> None:
    options = {"stop": stop, "include_stop_str_in_output": include, "min_tokens": min_tokens}
    one_by_one = grouped(ids, range(len(ids)), BYTE_LEVEL, **options)
    assert grouped(ids, cuts, BYTE_LEVEL, **options) == one_by_one
    assert grouped(ids, (), BYTE_LEVEL, **options) == one_by_one


@given(st.text("abcde ", max_size=80), st.lists(st.text("abcde ", min_size=1, max_size=5), min_size=1, max_size=4))
def test_the_text_ends_at_a_stop_string_and_holds_none_before(text: str, stop: list[str]) -> None:
    ids = BYTE_LEVEL.encode(text, False)
    shown, reason, _ = grouped(ids, (), BYTE_LEVEL, stop=stop)
    assert not any(string in shown for string in stop)
    if reason is None:
        assert shown == text
    else:
        assert text.startswith(shown + reason)


@given(st.text("abcde ", max_size=80), st.lists(st.text("abcde ", min_size=1, max_size=5), min_size=1, max_size=4))
def test_with_the_stop_string_included_the_text_ends_after_it(text: str, stop: list[str]) -> None:
    ids = BYTE_LEVEL.encode(text, False)
    without, reason, taken = grouped(ids, (), BYTE_LEVEL, stop=stop)
    assert grouped(ids, (), BYTE_LEVEL, stop=stop, include_stop_str_in_output=True) == (
        without + (reason or ""),
        reason,
        taken,
    )


def test_no_half_character_comes_out() -> None:
    ids = BYTE_LEVEL.encode("é😀日", False)
    assert len(ids) == 9
    shown = pieces(ids)
    assert [piece for piece in shown if piece] == ["é", "😀", "日"]


def test_what_is_no_character_comes_out_at_the_end_or_when_it_goes_on_too_long() -> None:
    half = BYTE_LEVEL.encode("😀", False)[:2]
    assert pieces(half) == ["", "", "\ufffd"]
    shown = pieces(half[1:] * 40)
    assert "".join(shown).count("\ufffd") == 40
    assert len([piece for piece in shown if piece]) >= 3


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    ids = [BYTE_LEVEL.encode(letter, False)[0] for letter in "xabax"]
    assert pieces(ids, stop=["abc"]) == ["x", "", "", "ab", "ax", ""]
    assert pieces(ids[:3], stop=["abc"]) == ["x", "", "", "ab"]


def test_the_first_of_two_matches_ends_the_text() -> None:
    ids = BYTE_LEVEL.encode("one two", False)
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["two", "e"])
    assert detokenizer.feed(ids) == "on"
    assert detokenizer.stop_reason == "e"


def test_of_two_matches_at_one_place_the_first_named_ends_the_text() -> None:
    token = BYTE_LEVEL.encode(" the", False)
    assert len(token) == 1
    for stop in (["th", "t"], ["t", "th"]):
        detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=stop)
        assert detokenizer.feed(token) == " "
        assert detokenizer.stop_reason == stop[0]


def test_tokens_after_a_stop_string_are_ignored() -> None:
    ids = [BYTE_LEVEL.encode(letter, False)[0] for letter in "abcd"]
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stop=["b"])
    assert detokenizer.feed(ids) == "a"
    assert detokenizer.num_tokens == 2
    assert detokenizer.feed(ids) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.num_tokens == 2


def test_the_first_tokens_hold_no_stop_string() -> None:
    ids = [BYTE_LEVEL.encode(letter, False)[0] for letter in "abab"]
    assert grouped(ids, (), BYTE_LEVEL, stop=["b"], min_tokens=2) == ("aba", "b", 4)
    assert grouped(ids, (), BYTE_LEVEL, stop=["ba"], min_tokens=2) == ("abab", None, 4)


def test_special_tokens_are_skipped_unless_asked_for() -> None:
    ids = BYTE_LEVEL.encode("hi<|im_end|>", False)
    assert "".join(pieces(ids)) == "hi"
    assert "".join(pieces(ids, skip_special_tokens=False)) == "hi<|im_end|>"


@pytest.mark.parametrize(("prompt", "expected"), [("", "Hello"), ("Say:", " Hello")])
def test_the_prompt_decides_about_the_first_blank(prompt: str, expected: str) -> None:
    own = sentence_piece()
    ids = own.encode("Hello", False)
    context = own.encode(prompt, False) if prompt else []
    assert "".join(pieces(ids, own, prompt_token_ids=context)) == expected


@given(st.text(max_size=30), st.integers(0, 40), st.lists(st.text("abe t", min_size=1, max_size=3), max_size=2))
def test_another_replica_goes_on_where_the_first_stopped(text: str, sent: int, stop: list[str]) -> None:
    ids = BYTE_LEVEL.encode(text, False)
    whole = pieces(ids, stop=stop)
    second = IncrementalDetokenizer(BYTE_LEVEL, stop=stop)
    second.feed(ids[:sent])
    rest = second.feed(ids[sent:]) + second.finish()
    assert "".join(whole[:sent]) + rest == "".join(whole) or sent > len(ids)

"""Tokens are spelled so that together they are the text, and a character of several tokens is its last one's."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from renderer.spelling import Spelling
from renderer.tokenizer import Tokenizer
from tests.checkpoints import checkpoint
from tests.renderer.test_tokenizer import tokenizer

BYTE_LEVEL = tokenizer()


def decode(token_ids: Sequence[int], own: Tokenizer = BYTE_LEVEL) -> str:
    return own.decode(token_ids, skip_special_tokens=False)


def spelled(token_ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    spelling, texts = Spelling(decode, before), []
    for token_id in token_ids:
        texts.append(spelling.text(token_id))
        spelling.go_on(token_id)
    return texts


@given(st.text(max_size=40))
def test_together_they_are_the_text(text: str) -> None:
    assert "".join(spelled(BYTE_LEVEL.encode(text, False))) == text.replace("\ufffd", "")


@pytest.mark.parametrize("character", ["ö", "日", "😀"])
def test_a_character_of_several_tokens_is_the_last_ones(character: str) -> None:
    ids = BYTE_LEVEL.encode(f"a{character}b", False)
    assert len(ids) > 3
    assert spelled(ids) == ["a", *[""] * (len(ids) - 3), character, "b"]


def test_it_goes_on_in_the_middle_of_a_character() -> None:
    ids = BYTE_LEVEL.encode("ab😀c", False)
    whole = spelled(ids)
    assert all(spelled(ids[cut:], ids[:cut]) == whole[cut:] for cut in range(len(ids)))


def test_another_token_in_a_place_is_spelled_after_the_same_ones() -> None:
    first, second = (BYTE_LEVEL.encode(character, False) for character in "日旗")
    assert first[:-1] == second[:-1]
    spelling = Spelling(decode, first[:-1])
    assert (spelling.text(first[-1]), spelling.text(second[-1])) == ("日", "旗")


def test_half_a_character_without_its_beginning_has_no_text() -> None:
    *_, last = BYTE_LEVEL.encode("😀", False)
    assert spelled([last, *BYTE_LEVEL.encode("a", False)]) == ["", "a"]


def test_tokens_of_a_sentencepiece_tokenizer_that_are_bytes_are_characters_too() -> None:
    own = tokenizer(str(checkpoint("llava")))
    ids = own.encode("x日y", False)
    spelling, texts = Spelling(lambda ids: decode(ids, own)), []
    for token_id in ids:
        texts.append(spelling.text(token_id))
        spelling.go_on(token_id)
    assert "".join(texts) == "x日y"

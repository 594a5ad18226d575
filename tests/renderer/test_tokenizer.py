"""Token ids are Hugging Face's, in many threads at the same time."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from renderer.errors import ConfigError, RequestError
from renderer.tokenizer import Tokenizer
from tests.checkpoints import checkpoint
from tests.renderer.builders import DEMO

TEXTS = [
    "",
    "Hello, world!",
    " two  blanks ",
    "日本語 😀 é é",
    "<|im_start|>user\n<|image_pad|>",
    "\x00\x7f",
    "a" * 999,
]


@cache
def tokenizer(model: str = str(DEMO)) -> Tokenizer:
    return Tokenizer.load(model, None, False)


@pytest.mark.parametrize("model", [str(DEMO), "llama", "qwen2"])
@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_ids_are_hugging_faces(model: str, add_special_tokens: bool) -> None:
    path = model if model == str(DEMO) else str(checkpoint(model))
    hf = AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        ids = tokenizer(path).encode(text, add_special_tokens)
        assert ids == hf(text, add_special_tokens=add_special_tokens)["input_ids"]
        assert tokenizer(path).decode(ids, skip_special_tokens=True) == hf.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_the_tail_of_a_text_is_hugging_faces_truncation(limit: int, add_special_tokens: bool) -> None:
    path = str(checkpoint("llama"))
    hf = AutoTokenizer.from_pretrained(path, truncation_side="left")
    expected = hf(TEXTS[1], add_special_tokens=add_special_tokens, truncation=True, max_length=limit)["input_ids"]
    assert tokenizer(path).encode_tail(TEXTS[1], add_special_tokens, limit) == expected


@given(st.text())
def test_text_survives_the_round_trip(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text, False), skip_special_tokens=False) == text


def test_threads_share_a_tokenizer_without_mixing_up() -> None:
    expected = {text: tokenizer().encode(text, False) for text in TEXTS}
    jobs = TEXTS * 200
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda text: tokenizer().encode(text, False), jobs))
    assert all(result == expected[text] for text, result in zip(jobs, results, strict=True))


def test_half_a_surrogate_pair_is_the_callers_fault() -> None:
    with pytest.raises(RequestError, match="not Unicode"):
        tokenizer().encode("half \ud83d of it", False)


def test_unknown_ids_vanish_and_impossible_ones_are_the_callers_fault() -> None:
    ids = tokenizer().encode("ab", False)
    assert tokenizer().decode([*ids, 70_000], skip_special_tokens=False) == "ab"
    assert tokenizer().decode([], skip_special_tokens=False) == ""
    for impossible in (2**32, -1):
        with pytest.raises(RequestError):
            tokenizer().decode([impossible], skip_special_tokens=False)


def test_special_tokens_are_kept_or_skipped() -> None:
    ids = tokenizer().encode("<|im_start|>hi<|im_end|>", False)
    assert tokenizer().decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"
    assert tokenizer().decode(ids, skip_special_tokens=True) == "hi"


def test_pieces_are_the_vocabularys_spelling() -> None:
    ids = tokenizer().encode(" w", False)
    assert "".join(tokenizer().pieces(ids)) == "Ġw"
    assert tokenizer().pieces([70_000]) == [""]


def test_no_text_is_longer_than_its_tokens_allow() -> None:
    for text in TEXTS:
        assert len(text) <= tokenizer().max_token_chars * len(tokenizer().encode(text, False))


def test_a_tokenizer_that_was_saved_with_truncation_and_padding_cuts_and_fills_nothing(tmp_path: Path) -> None:
    hf = AutoTokenizer.from_pretrained(DEMO)
    hf.backend_tokenizer.enable_truncation(4)
    hf.backend_tokenizer.enable_padding(length=64)
    hf.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 4
    assert saved["padding"]["strategy"] == {"Fixed": 64}
    own = Tokenizer.load(str(tmp_path), None, False)
    assert own.encode("one two three four five six", False) == tokenizer().encode("one two three four five six", False)


class _Slow:
    name_or_path = "some/model"
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012


def test_a_tokenizer_without_a_fast_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="no fast tokenizer"):
        Tokenizer(_Slow())

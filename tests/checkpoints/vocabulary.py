"""Small tokenizers of the three forms that vision-language models use.

    bytes     byte-level BPE behind a splitting regex (Qwen, Llama 3, Mistral's Tekken, InternVL, Idefics3, SmolVLM)
    gemma     BPE over characters with byte fallback, blanks as U+2581, runs of newlines as entries of their own
    llama     the same, and a blank put before each text (LLaVA 1.5 and LLaVA-NeXT, through Llama 2)

All three take any text. `bytes` and `gemma` give it back exactly.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.checkpoints.corpus import corpus

Form = Literal["bytes", "gemma", "llama"]
ENTRIES = 512

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Merged before all others, so that runs of two, three and four are single tokens and longer runs begin with fours.
_NEWLINE_MERGES = [("\n", "\n"), ("\n\n", "\n\n"), ("\n\n", "\n")]


def make_tokenizer(form: Form, first: tuple[str, ...], last: tuple[str, ...], bos: str | None) -> Tokenizer:
    """A tokenizer of `ENTRIES` trained entries.

    Args:
        form: See the module.
        first: Special tokens with the lowest ids, in order.
        last: Special tokens with the highest ids, in order.
        bos: The token that is put before a text when special tokens are asked for.
    """
    tokenizer = _byte_level(first) if form == "bytes" else _sentencepiece(form, first)
    special = [AddedToken(token, special=True, normalized=False) for token in (*first, *last)]
    tokenizer.add_special_tokens(special)
    if bos is not None:
        template = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = template
    return tokenizer


def _byte_level(first: tuple[str, ...]) -> Tokenizer:
    pieces, merges = _trained_bytes()
    vocabulary = {piece: index for index, piece in enumerate((*first, *pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = _byte_level_split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_level_split() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(form: Form, first: tuple[str, ...]) -> Tokenizer:
    pieces, merges = _trained_pieces()
    vocabulary = {piece: index for index, piece in enumerate((*first, *pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = blanks if form == "gemma" else normalizers.Sequence([normalizers.Prepend("▁"), blanks])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(undo if form == "gemma" else [*undo, decoders.Strip(" ", 1, 0)])
    return tokenizer


@cache
def _trained_bytes() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _train(_byte_level_split(), ENTRIES, alphabet, corpus())


@cache
def _trained_pieces() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    split = pre_tokenizers.Split(Regex(r"\n+|▁?[^▁\n]+|▁"), "isolated")
    newlines = tuple(left + right for left, right in _NEWLINE_MERGES)
    texts = [text.replace(" ", "▁").replace("\n", "") for text in corpus()]
    pieces, merges = _train(split, ENTRIES - len(_BYTES) - len(newlines), ["\n"], texts)
    return (*_BYTES, *pieces, *newlines), (*_NEWLINE_MERGES, *merges)


def _train(
    split: pre_tokenizers.PreTokenizer, entries: int, alphabet: list[str], texts: list[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    trainer = trainers.BpeTrainer(vocab_size=entries, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    pieces = tuple(sorted(vocabulary, key=vocabulary.__getitem__))
    return pieces, _merges(tokenizer)


def _merges(tokenizer: Tokenizer) -> tuple[tuple[str, str], ...]:
    model: dict[str, dict[str, list[list[str]]]] = json.loads(tokenizer.to_str())
    return tuple((left, right) for left, right in model["model"]["merges"])

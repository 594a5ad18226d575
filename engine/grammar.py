"""Structured output: which tokens may come next, so that the text follows a JSON schema.

Needs the extra `structured`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from renderer.errors import NotSupportedError, RequestError

logger = logging.getLogger("greenroom.engine.grammar")

_ANY_OBJECT = {"type": "object"}


class Grammar:
    """The state of one output."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """bool [vocabulary]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.zeros(self._vocab_size, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed[: len(known)] = known
        return allowed

    def advance(self, token_ids: Sequence[int]) -> bool:
        """Take tokens; False where they do not follow the grammar."""
        return bool(self._matcher.consume_tokens(list(token_ids)))


class Grammars:
    """Compiles schemas for one tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def start(self, schema: dict[str, Any], prior_output_ids: Sequence[int]) -> Grammar:
        """A grammar that has seen the output so far.

        Raises:
            RequestError: The schema cannot be compiled, or the prior output does not follow it.
        """
        from llguidance import LLMatcher

        try:
            written = json.dumps(schema or _ANY_OBJECT)
            text = LLMatcher.grammar_from_json_schema(written, {"whitespace_flexible": False})
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema cannot be read: {error}", "response_format") from error
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise RequestError(f"the JSON schema cannot be followed: {matcher.get_error()}", "response_format")
        grammar = Grammar(matcher, self._vocab_size)
        if prior_output_ids and not grammar.advance(prior_output_ids):
            raise RequestError("the output that is to be continued does not follow the JSON schema", "response_format")
        return grammar


def load_grammars(model: str, revision: str | None, vocab_size: int, eos_ids: frozenset[int]) -> Grammars | None:
    """None where the extra is not installed, or the checkpoint has no fast tokenizer."""
    try:
        from llguidance.hf import from_tokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        return Grammars(from_tokenizer(tokenizer, vocab_size, sorted(eos_ids) or None), vocab_size)
    except (ImportError, OSError, ValueError) as error:
        logger.warning("no structured output: %s", error)
        return None


def require(grammars: Grammars | None) -> Grammars:
    """Raises NotSupportedError where structured output is not to be had."""
    if grammars is None:
        raise NotSupportedError("structured output needs the extra greenroom[structured]", "response_format")
    return grammars

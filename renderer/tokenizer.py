"""Text to token ids and back, through the checkpoint's fast tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import AutoTokenizer

from renderer.errors import ConfigError, RequestError


class Tokenizer:
    """The checkpoint's fast tokenizer, without truncation and padding. Thread-safe.

    Only the methods of the Rust tokenizer that leave it unchanged are called. Hugging Face's wrapper sets truncation
    and padding on it in every call, which two threads must not do at the same time.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(f"{hf_tokenizer.name_or_path} has no fast tokenizer (tokenizer.json)")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.hf = hf_tokenizer
        self.special_tokens: Mapping[str, str] = dict(hf_tokenizer.special_tokens_map)

    @classmethod
    def load(cls, model: str, revision: str | None, trust_remote_code: bool) -> Tokenizer:
        """Load from a local checkpoint or the hub."""
        return cls(AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens in the text become their ids.

        Raises:
            RequestError: The text holds half of a surrogate pair, which is no Unicode text.
        """
        ids: list[int] = self._encoding(text, add_special_tokens).ids
        return ids

    def encode_tail(self, text: str, add_special_tokens: bool, limit: int) -> list[int]:
        """The last token ids of a text, `limit` at most; special tokens that are added stay, and count.

        Raises:
            RequestError: As for `encode`.
        """
        ids: list[int] = self._tail(text, add_special_tokens, limit).ids
        return ids

    def offsets(self, text: str, add_special_tokens: bool, limit: int | None = None) -> tuple[tuple[int, int], ...]:
        """Where each token of a text, or of its tail, stands: its first character and the one behind its last.

        Raises:
            RequestError: As for `encode`.
        """
        if limit is None:
            return tuple(self._encoding(text, add_special_tokens).offsets)
        return tuple(self._tail(text, add_special_tokens, limit).offsets)

    def _tail(self, text: str, add_special_tokens: bool, limit: int) -> Any:
        encoding = self._encoding(text, False)
        added = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding.truncate(max(0, limit - added), direction="left")
        return self._backend.post_process(encoding, None, add_special_tokens)

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            _refuse_lone_surrogates(text)
            raise

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids; ids that the tokenizer does not know vanish.

        Raises:
            RequestError: An id is no 32-bit unsigned number.
        """
        try:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise RequestError(f"a token id does not fit its type: {error}", "tokens") from error
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each token, empty for an unknown id."""
        return [self._backend.id_to_token(token_id) or "" for token_id in ids]

    def id_of(self, token: str) -> int:
        """Id of a token of the vocabulary.

        Raises:
            ConfigError: There is no such token.
        """
        token_id: int | None = self._backend.token_to_id(token)
        if token_id is None:
            raise ConfigError(f"the tokenizer has no token {token!r}")
        return token_id

    @cached_property
    def max_token_chars(self) -> int:
        """Characters that the longest token stands for, at most."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)


def _refuse_lone_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not Unicode: {error.reason} at character {error.start}") from error

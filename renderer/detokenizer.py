"""Token ids to text while they come, with stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from renderer.tokenizer import Tokenizer

# Tokens of the prompt that decide how the output's first ones are spelled (SentencePiece: a leading blank).
CONTEXT_TOKENS = 6
_HALF_CHARACTER = "\ufffd"
# A character is spread over 4 tokens at most. So many without a whole one are no text, and are not waited for.
MAX_PENDING_TOKENS = 16


@dataclass(frozen=True, slots=True)
class DetokenizerState:
    """What another detokenizer needs to go on where one without stop strings is.

    Attributes:
        context: Tokens whose text is final, which the next ones are decoded after.
        pending: Tokens whose text is not.
    """

    context: tuple[int, ...]
    pending: tuple[int, ...] = ()


class IncrementalDetokenizer:
    """The text of one output. Not thread-safe.

    What is returned after k tokens is a function of the first k tokens alone, however they are grouped, so that
    another replica can continue: it feeds the tokens that are there already, and drops the text that was sent.

    Args:
        tokenizer: Of the model.
        prompt_token_ids: The prompt, or its tail of at least 6 tokens.
        stop: Strings that end the output. The text that may be the beginning of one is held back.
        skip_special_tokens: Whether special tokens are left out of the text.
        include_stop_str_in_output: Whether the text ends after the stop string that matched, or before it.
        min_tokens: The text of this many tokens neither holds a stop string nor the beginning of one.

    Attributes:
        stop_reason: The stop string that matched; tokens fed after it are ignored.
        num_tokens: Tokens taken, the one that completed the stop string included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.stop_reason: str | None = None
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._stop = tuple(string for string in stop if string)
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        # Tokens whose text is final, which the next ones are decoded after, and tokens whose text is not yet.
        self._context = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []
        self._held_back = ""

    @property
    def state(self) -> DetokenizerState:
        """Where it is: a few tokens, however long the output."""
        return DetokenizerState(tuple(self._context), tuple(self._pending))

    @classmethod
    def resumed(cls, tokenizer: Tokenizer, state: DetokenizerState, skip_special_tokens: bool) -> Self:
        """A detokenizer that goes on where another one was.

        Raises:
            RequestError: A token id is no 32-bit unsigned number.
        """
        detokenizer = cls(tokenizer, skip_special_tokens=skip_special_tokens)
        detokenizer._context, detokenizer._pending = list(state.context), list(state.pending)
        detokenizer._context_text = detokenizer._decode(state.context)
        return detokenizer

    def feed(self, token_ids: Iterable[int]) -> str:
        """Take tokens; return the text that they make final."""
        final = []
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            self._pending.append(token_id)
            final.append(self._emit(self._decode_pending(at_end=False)))
        return "".join(final)

    def finish(self) -> str:
        """The rest of the text, of half characters and held-back beginnings: nothing comes after it."""
        if self.stop_reason is not None:
            return ""
        text = self._emit(self._decode_pending(at_end=True))
        rest, self._held_back = self._held_back, ""
        return text + rest

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

    def _decode_pending(self, at_end: bool) -> str:
        """Text of the pending tokens once it ends in a whole character, else nothing."""
        text = self._decode(self._context + self._pending)
        new = text[len(self._context_text) :]
        must_flush = at_end or len(self._pending) >= MAX_PENDING_TOKENS
        if not must_flush and (not new or new.endswith(_HALF_CHARACTER)):
            return ""
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return new

    def _emit(self, new: str) -> str:
        """What of the held-back and the new text is final, cut where a stop string matches."""
        if self.num_tokens <= self._min_tokens or not self._stop:
            return new
        text = self._held_back + new
        match = min(((place, stop) for stop in self._stop if (place := text.find(stop)) >= 0), default=None, key=_place)
        if match is not None:
            place, self.stop_reason = match
            self._held_back = ""
            return text[: place + len(self.stop_reason)] if self._include_stop else text[:place]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held_back = text[len(text) - held :]
        return text[: len(text) - held]


def _place(match: tuple[int, str]) -> int:
    return match[0]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

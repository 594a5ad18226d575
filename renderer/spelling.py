"""The text of an output's tokens, one by one, as log-probabilities show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A character is spread over 4 tokens at most, and the last of them is the one that is spelled.
_CONTEXT_TOKENS = 4
_HALF_CHARACTER = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class Spelling:
    """Spells the tokens of one output. A character of several tokens is the text of its last one, the others have none:
    all texts together are the output's.

    Args:
        decode: Text of token ids, special tokens included.
        before: The output's tokens before those that are spelled, or the last few of them.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._before = list(before[-_CONTEXT_TOKENS:])

    def text(self, token_id: int) -> str:
        """The text of a token that stands, or might stand, in the next place."""
        alone = self._decode((token_id,))
        if not alone.endswith(_HALF_CHARACTER):
            return alone
        for count in range(1, len(self._before) + 1):
            context = self._before[-count:]
            together = self._decode((*context, token_id))
            if not together.endswith(_HALF_CHARACTER):
                return _without(together, self._decode(self._whole(context)))
        return ""

    def go_on(self, token_id: int) -> None:
        """Take the token that stands in the next place."""
        self._before = [*self._before, token_id][-_CONTEXT_TOKENS:]

    def _whole(self, context: list[int]) -> list[int]:
        """The context without the tokens at its end that are parts of a character."""
        end = len(context)
        while end and self._decode((context[end - 1],)).endswith(_HALF_CHARACTER):
            end -= 1
        return context[:end]


def _without(text: str, prefix: str) -> str:
    """The text after what it has in common with a prefix."""
    same = 0
    while same < min(len(text), len(prefix)) and text[same] == prefix[same]:
        same += 1
    return text[same:]

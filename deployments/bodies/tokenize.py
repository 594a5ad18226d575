"""Bodies of `/tokenize` and `/detokenize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from deployments.bodies.chat import ConversationBody
from deployments.bodies.strict import IGNORED, Body, Data, loaded, parse


class TokenizeTextBody(Body):
    """`POST /tokenize` of a text."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False

    def request(self) -> str:
        return self.prompt


class TokenizeChatBody(ConversationBody):
    """`POST /tokenize` of a conversation, which wins over a text beside it."""

    ignored: ClassVar[frozenset[str]] = IGNORED | {"prompt"}

    return_token_strs: bool = False


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    tokens: list[Annotated[int, Field(ge=0, le=2**63 - 1)]]


def parse_tokenize(data: Data) -> TokenizeTextBody | TokenizeChatBody:
    """See `parse`."""
    given = loaded(data)
    if isinstance(given, Mapping) and given.get("messages") is not None:
        return parse(TokenizeChatBody, given)
    return parse(TokenizeTextBody, given)

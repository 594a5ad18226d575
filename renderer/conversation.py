"""What is asked of a renderer: chat and completion requests, free of JSON and of HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from renderer.prompt import PlaceholderRange, Tensors


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image of a message: its encoded bytes, or where to get them, or only the name of one that is cached.

    Attributes:
        data: The encoded file (PNG, JPEG, ...), as received, base64 undone.
        url: `http(s):` or `file:` address, where there are no bytes yet.
        uuid: The caller's own name for the content.
    """

    data: bytes | None = None
    url: str | None = None
    uuid: str | None = None

    @property
    def is_remote(self) -> bool:
        """Whether its bytes are still to be fetched."""
        return self.data is None and self.url is not None and self.url[:5].lower() != "data:"


Part = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `extra` holds what only the chat template reads (`tool_calls`, `name`, `reasoning`, ...)."""

    role: str
    content: str | tuple[Part, ...] | None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Messages to render, and the options that shape their tokens.

    Attributes:
        truncate_prompt_tokens: -1 stands for the model's length, less one where there is to be `room_for_output`.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    documents: tuple[Mapping[str, Any], ...] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    room_for_output: bool = False
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Prompts to render, each a text or token ids that pass through unchanged.

    Attributes:
        truncate_prompt_tokens: As of a `ChatRequest`.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    room_for_output: bool = False
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class TokensRequest:
    """Token ids with one placeholder token an item, and the items."""

    token_ids: tuple[int, ...]
    media: tuple[ImagePart, ...] = ()
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class FeatureItem:
    """One media item that arrived processed.

    Attributes:
        mm_hash: The caller's claim of what it is.
        range: Where it stands. Without a mask the tokens themselves tell where its embeddings go.
        data: Its tensors, as MessagePack (`renderer.wire`) or by name; None for one that the engine should hold.
    """

    mm_hash: str
    range: PlaceholderRange
    data: bytes | Tensors | None


@dataclass(frozen=True, slots=True)
class FeaturesRequest:
    """Token ids that are expanded already, and the items that stand in them, in their order."""

    token_ids: tuple[int, ...]
    items: tuple[FeatureItem, ...]
    cache_salt: str | None = None


Request = ChatRequest | CompletionRequest | TokensRequest | FeaturesRequest


def media_of(request: Request | str) -> tuple[ImagePart, ...]:
    """The raw images of a request, in their order; none in texts and in what arrived processed."""
    if isinstance(request, TokensRequest):
        return request.media
    if not isinstance(request, ChatRequest):
        return ()
    contents = (message.content for message in request.messages if isinstance(message.content, tuple))
    return tuple(part for content in contents for part in content if isinstance(part, ImagePart))

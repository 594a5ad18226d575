"""Answers in OpenAI's shapes: attributes for handle callers, and what `orjson` writes as JSON, unset fields as null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.calls import LogprobEntry


@dataclass(frozen=True, slots=True)
class PromptTokensDetails:
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """`prompt_tokens` counts expanded images; `completion_tokens` every token of all choices, the last one included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None
    completion_tokens_details: None = None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    content: str
    role: str = "assistant"
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    reasoning: None = None


@dataclass(frozen=True, slots=True)
class ChatChoice:
    index: int
    message: ChatMessage
    logprobs: Mapping[str, Any] | None
    finish_reason: str
    stop_reason: int | str | None
    token_ids: tuple[int, ...] | None = None
    routed_experts: None = None


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    object: str = "chat.completion"
    prompt_logprobs: Any = None
    prompt_token_ids: None = None
    prompt_text: None = None
    kv_transfer_params: Mapping[str, Any] | None = None
    ec_transfer_params: None = None
    metrics: None = None
    service_tier: None = None
    system_fingerprint: None = None


@dataclass(frozen=True, slots=True)
class ChunkChoice:
    """`delta` has `role` in a choice's first chunk and `content` where there is new text."""

    index: int
    delta: Mapping[str, str]
    logprobs: Mapping[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class ChatChunk:
    id: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | None = None
    object: str = "chat.completion.chunk"


@dataclass(frozen=True, slots=True)
class TextChoice:
    index: int
    text: str
    logprobs: Mapping[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class TextCompletion:
    """A whole completion, and a chunk of a streamed one: they have the same form."""

    id: str
    created: int
    model: str
    choices: tuple[TextChoice, ...]
    usage: Usage | None = None
    object: str = "text_completion"
    system_fingerprint: None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    id: str
    created: int
    root: str
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "greenroom"
    parent: None = None
    permission: tuple[()] = ()


@dataclass(frozen=True, slots=True)
class ModelList:
    data: tuple[ModelCard, ...]
    object: str = "list"


@dataclass(frozen=True, slots=True)
class TokenizeAnswer:
    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class DetokenizeAnswer:
    prompt: str


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> Usage:
    """
    Args:
        cached_tokens: Of the prompt, those that the engine had in its prefix cache; None where that is not known.
    """
    details = None if cached_tokens is None else PromptTokensDetails(cached_tokens)
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)


def chat_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, Any] | None:
    """The `logprobs` object of a chat choice."""
    if not entries:
        return None
    return {"content": [{**_token(entry), "top_logprobs": [_token(top) for top in entry.top]} for entry in entries]}


def text_logprobs(entries: Sequence[LogprobEntry], offset: int) -> dict[str, Any] | None:
    """The `logprobs` object of a completion choice, in its older form.

    Args:
        offset: Characters of the choice's text before these tokens.
    """
    if not entries:
        return None
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{top.token: top.logprob for top in entry.top} for entry in entries],
        "text_offset": offsets,
    }


def _token(entry: LogprobEntry) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.token.encode())}

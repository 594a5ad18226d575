"""Answers of token-in/token-out, whole or chunk by chunk, in the shapes of vLLM's `/inference/v1/generate`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.answers.completions import Head
from deployments.answers.openai import Usage, chat_logprobs
from deployments.calls import DEFAULT_WEIGHTS, Delta, LogprobEntry, Started
from renderer.prompt import PlaceholderRange

# JSON has no infinity: what stands for it on the wire.
_LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """`token_ids` and `logprobs` of the whole choice, or of a chunk; `weight_versions` with its last token."""

    index: int
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: tuple[int, ...]
    weight_versions: tuple[Mapping[str, Any], ...] | None
    logprobs: Mapping[str, Any] | None
    routed_experts: None = None
    sampling_mask: None = None


@dataclass(frozen=True, slots=True)
class TextTokenChoice(TokenChoice):
    """A choice in output mode `text`."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """`prompt_token_ids` and `mm_placeholders` where `return_token_ids` asks for them."""

    request_id: str
    model: str
    created: int
    usage: Usage
    output_mode: str
    choices: tuple[TokenChoice, ...]
    prompt_token_ids: tuple[int, ...] | None = None
    mm_placeholders: Mapping[str, Any] | None = None
    prompt_logprobs: None = None
    prompt_token_id_logprobs: None = None
    metrics: None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None


@dataclass(frozen=True, slots=True)
class TokenChunk:
    request_id: str
    output_mode: str
    choices: tuple[TokenChoice, ...]
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class FirstTokenChunk(TokenChunk):
    """The first chunk, where `return_token_ids` asks for the prompt."""

    prompt_token_ids: tuple[int, ...] = ()
    mm_placeholders: Mapping[str, Any] | None = None


class TokenForm:
    """The answers of one request.

    Args:
        text: Whether they have text, and logprobs in OpenAI's form.
        prompt: Whether they repeat the prompt's tokens.
    """

    def __init__(self, head: Head, text: bool, prompt: bool) -> None:
        self._head = head
        self._text = text
        self._prompt = prompt
        self._started: Started | None = None
        self._sent: Counter[int] = Counter()  # tokens of each choice

    def start(self, event: Started) -> None:
        self._started = self._started or event

    def whole(self, deltas: Mapping[int, Delta], usage: Usage) -> TokenAnswer:
        choices = tuple(self._choice(deltas[index], deltas[index].finish_reason or "stop") for index in sorted(deltas))
        head = self._head
        return TokenAnswer(head.id, head.model, head.created, usage, self._mode, choices, *self._shown_prompt())

    def chunk(self, delta: Delta, first: bool, offset: int, usage: Usage | None) -> TokenChunk:
        nothing = not self._sent
        choices = (self._choice(delta, delta.finish_reason),)
        if self._prompt and nothing:
            ids, places = self._shown_prompt()
            return FirstTokenChunk(self._head.id, self._mode, choices, usage, ids or (), places)
        return TokenChunk(self._head.id, self._mode, choices, usage)

    def last(self, usage: Usage) -> TokenChunk:
        return TokenChunk(self._head.id, self._mode, (), usage)

    def shows(self, delta: Delta) -> bool:
        return bool(delta.token_ids or delta.finish_reason)

    @property
    def _mode(self) -> str:
        return "text" if self._text else "tokens"

    def _choice(self, delta: Delta, finish_reason: str | None) -> TokenChoice:
        self._sent[delta.index] += len(delta.token_ids)
        versions = None if finish_reason is None else self._versions(self._sent[delta.index])
        logprobs = chat_logprobs(delta.logprobs) if self._text else token_logprobs(delta.logprobs)
        fields = (delta.index, finish_reason, delta.stop_reason, delta.token_ids, versions, logprobs)
        return TextTokenChoice(*fields, text=delta.text) if self._text else TokenChoice(*fields)

    def _versions(self, count: int) -> tuple[Mapping[str, Any], ...]:
        version = DEFAULT_WEIGHTS if self._started is None else self._started.weights
        return ({"version": version, "start": 0, "end": count},)

    def _shown_prompt(self) -> tuple[tuple[int, ...] | None, Mapping[str, Any] | None]:
        if not self._prompt or self._started is None:
            return None, None
        return self._started.token_ids, _placeholders(self._started.ranges)


def token_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, Any] | None:
    """One entry a token; the sampled token comes first among the likeliest."""
    if not entries:
        return None
    return {"content": [{**_token(entry), "top_logprobs": _tops(entry)} for entry in entries]}


def _tops(entry: LogprobEntry) -> list[dict[str, Any]]:
    return [_token(entry), *(_token(top) for top in entry.top if top.token_id != entry.token_id)]


def _token(entry: LogprobEntry) -> dict[str, Any]:
    logprob = entry.logprob if math.isfinite(entry.logprob) else _LOWEST_LOGPROB
    return {"token_id": entry.token_id, "logprob": logprob, "rank": entry.rank}


def _placeholders(ranges: Sequence[PlaceholderRange]) -> dict[str, Any] | None:
    places = [{"offset": place.offset, "length": place.length} for place in ranges]
    return {"image": places} if places else None

"""Prompts and outputs on the wire of `/inference/v1/generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pybase64

from engine.protocol import EngineOutput, FinishReason, SamplingParams, TokenLogprobs
from renderer.errors import (
    CacheMissError,
    EngineDeadError,
    EngineError,
    GreenroomError,
    OverloadedError,
    RequestError,
)
from renderer.family import Field
from renderer.hashing import content_key
from renderer.prompt import PlaceholderRange, PromptItem, RenderedPrompt
from renderer.wire import FloatType, encode_item


@dataclass(frozen=True, slots=True)
class Wire:
    """What the body of every request depends on.

    Attributes:
        fields: Of the family's tensors.
        float_type: What float tensors become.
        model: The servers' name for the model; None where they have only one.
    """

    fields: Mapping[str, Field]
    float_type: FloatType
    model: str | None

    def body(self, prompt: RenderedPrompt, appended: Sequence[int], params: SamplingParams, request_id: str) -> bytes:
        """A streaming generate request, as JSON.

        Raises:
            CacheMissError: An item has no tensors.
            RequestError: An item cannot be told to a server.
        """
        body = {
            "request_id": request_id,
            "token_ids": [*prompt.token_ids, *appended],
            "features": self._features(prompt.items) if prompt.items else None,
            "sampling_params": _sampling(params),
            "stream": True,
            "stream_options": {"include_usage": True},
            "output_mode": "tokens",
            "cache_salt": prompt.cache_salt,
        }
        if self.model is not None:
            body["model"] = self.model
        return orjson.dumps(body)

    def _features(self, items: Sequence[PromptItem]) -> dict[str, Any]:
        return {
            "mm_hashes": {"image": [_server_hash(item) for item in items]},
            "mm_placeholders": {"image": [_server_range(item.range) for item in items]},
            "kwargs_data": {"image": [self._data(item) for item in items]},
        }

    def _data(self, item: PromptItem) -> str:
        if item.tensors is None:
            raise CacheMissError(f"item {item.mm_hash} came without data, and a remote engine is sent all of it")
        try:
            return pybase64.b64encode(encode_item(item.tensors, self.fields, self.float_type)).decode()
        except ValueError as error:
            raise RequestError(f"item {item.mm_hash}: {error}", "features") from error


def read_event(data: str, params: SamplingParams) -> EngineOutput | None:
    """What one event of a stream brings; None for one without a choice.

    Raises:
        GreenroomError: The server gives the request up.
    """
    try:
        event = orjson.loads(data)
        if "error" in event:
            raise server_error(int(event["error"].get("code") or 500), event)
        return _output(event["choices"][0], params) if event["choices"] else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"the server sends what is not an answer to a generate request: {error!r}") from error


def read_cached_tokens(data: str) -> int:
    """Prompt tokens from the server's prefix cache, by the usage in an event; 0 where it does not tell."""
    details = (orjson.loads(data).get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def server_error(status: int, body: Any) -> GreenroomError:
    """A server's refusal as an error of ours."""
    error = body.get("error") if isinstance(body, Mapping) else None
    details: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    message = str(details.get("message") or f"the server answers with status {status}")
    param = details.get("param")
    if status in (400, 413, 422):
        return RequestError(message, param if isinstance(param, str) else None)
    if status in (429, 503):
        return OverloadedError(message)
    if status in (401, 403, 404):
        return EngineError(f"the server does not take our requests (status {status}): {message}")
    return EngineDeadError(message) if status == 502 else EngineError(f"the server failed: {message}")


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """Every field that matters is written: an absent `max_tokens` would mean the whole context."""
    return {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "seed": params.seed,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": params.ignore_eos,
        "min_tokens": params.min_tokens,
        "logprobs": params.logprobs,
        "structured_outputs": _structured(params.structured),
        "detokenize": False,
    }


def _structured(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    return {"json": schema} if schema else {"json_object": True}


def _server_hash(item: PromptItem) -> str:
    """The hash of content is what the server itself would compute; any claim keeps the key space it has here."""
    return item.mm_hash if item.cache_key == content_key(item.mm_hash) else item.cache_key


def _server_range(place: PlaceholderRange) -> dict[str, int]:
    """The tokens that carry embeddings: the wire has no mask, and a server takes every token of a range for one.

    Raises:
        RequestError: Other tokens are among them.
    """
    if place.embed_mask is None:
        return {"offset": place.offset, "length": place.length}
    first, count = place.embed_mask.index(True), sum(place.embed_mask)
    if not all(place.embed_mask[first : first + count]):
        raise RequestError("images of this model cannot be sent to a remote engine: their tokens are not in one piece")
    return {"offset": place.offset + first, "length": count}


def _output(choice: Mapping[str, Any], params: SamplingParams) -> EngineOutput:
    reason = choice["finish_reason"]
    if reason == "error":
        raise EngineError("the server failed on this request")
    stop = choice.get("stop_reason")
    return EngineOutput(
        tuple(choice["token_ids"]),
        _finish_reason(reason),
        stop if stop in params.stop_token_ids else None,
        logprobs=_logprobs(choice.get("logprobs"), params.logprobs),
    )


def _finish_reason(reason: str | None) -> FinishReason | None:
    match reason:
        case None | "length" | "abort":
            return reason
        case _:
            return "stop"


def _logprobs(logprobs: Mapping[str, Any] | None, count: int | None) -> tuple[TokenLogprobs, ...]:
    if logprobs is None or count is None:
        return ()
    return tuple(_token_logprobs(entry, count) for entry in logprobs["content"])


def _token_logprobs(entry: Mapping[str, Any], count: int) -> TokenLogprobs:
    likeliest = sorted(entry["top_logprobs"], key=lambda other: other["rank"])
    top = tuple((other["token_id"], other["logprob"]) for other in likeliest if other["rank"] <= count)
    return TokenLogprobs(entry["token_id"], entry["logprob"], entry["rank"], top)

"""The answer to a render-only request over HTTP: everything that `generate` takes, written once and never joined.

Both forms are the same object. Where JSON has the base64 of an item, MessagePack has its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import orjson
import pybase64

from deployments.answers.forms import AnswerForm
from deployments.answers.pieces import Piece, coalesced
from deployments.calls import Envelope, RenderCall, SamplingRequest
from engine.protocol import SamplingParams
from renderer.base64_parts import base64_parts
from renderer.conversation import CompletionRequest, TokensRequest
from renderer.embed_runs import embed_runs
from renderer.family import Field
from renderer.offsets import Offsets
from renderer.prompt import PromptItem, RenderedPrompt
from renderer.wire import FloatType, encode_metadata, item_parts

OUTPUT_DELTA, OUTPUT_FINAL = 1, 2
_BINARY = b"\xc6"  # MessagePack's mark of bytes whose length takes four bytes


@dataclass(frozen=True, slots=True)
class ItemCodec:
    """How a model's items travel.

    Attributes:
        fields: How an engine joins the tensors of a batch, by tensor name.
        float_type: What float32 tensors become.
    """

    fields: Mapping[str, Field]
    float_type: FloatType = "bfloat16"


@dataclass(frozen=True, slots=True)
class _GenerateRequest:
    """One generate request, but for its tensors written as they are.

    Attributes:
        features: None without items.
        items: The parts of every item; None in a layout.
    """

    fields: dict[str, Any]
    features: dict[str, Any] | None
    items: list[list[Piece]] | None


def render_answer(
    call: RenderCall,
    prompts: Sequence[RenderedPrompt],
    params: Sequence[SamplingParams],
    codec: ItemCodec,
    offsets: Sequence[Offsets | None] | None = None,
) -> list[Piece]:
    """One generate request for a chat or for token ids, a list of them for completions; in pieces.

    Args:
        params: What an engine would be told, one for each prompt.
        offsets: Where the tokens of each prompt stand in its text, where that is asked for.
    """
    envelope, sampling = call.envelope, call.sampling
    ids = _ids(call, len(prompts))
    requests = [
        _generate_request(request_id, envelope, sampling, prompt, own, codec, call.form, places)
        for request_id, prompt, own, places in zip(ids, prompts, params, offsets or [None] * len(ids), strict=True)
    ]
    several = isinstance(call.request, CompletionRequest)
    return coalesced(_json_pieces(requests, several) if call.form == "json" else _packed_pieces(requests, several))


def _json_pieces(requests: Sequence[_GenerateRequest], several: bool) -> Iterator[Piece]:
    yield b"[" if several else b""
    for place, request in enumerate(requests):
        yield b"," if place else b""
        yield from _json(request)
    yield b"]" if several else b""


def _json(request: _GenerateRequest) -> Iterator[Piece]:
    """Base64 needs neither decoding nor escaping, so it is put between what is written as JSON."""
    yield orjson.dumps(request.fields)[:-1] + b',"features":'
    if request.features is None or request.items is None:
        yield orjson.dumps(request.features and {**request.features, "kwargs_data": None}) + b"}"
        return
    yield orjson.dumps(request.features)[:-1] + b',"kwargs_data":{"image":["'
    for place, parts in enumerate(request.items):
        yield b'","' if place else b""
        yield from base64_parts(parts)
    yield b'"]}}}'


def _packed_pieces(requests: Sequence[_GenerateRequest], several: bool) -> Iterator[Piece]:
    packer = msgpack.Packer()
    if several:
        yield packer.pack_array_header(len(requests))
    for request in requests:
        yield from _packed(request, packer)


def _packed(request: _GenerateRequest, packer: msgpack.Packer) -> Iterator[Piece]:
    yield packer.pack_map_header(len(request.fields) + 1)
    yield from _packed_entries(request.fields, packer)
    yield packer.pack("features")
    if request.features is None:
        yield packer.pack(None)
        return
    yield packer.pack_map_header(len(request.features) + 1)
    yield from _packed_entries(request.features, packer)
    yield packer.pack("kwargs_data")
    if request.items is None:
        yield packer.pack(None)
        return
    yield packer.pack_map_header(1) + packer.pack("image") + packer.pack_array_header(len(request.items))
    for parts in request.items:
        yield _BINARY + sum(map(len, parts)).to_bytes(4, "big")
        yield from parts


def _packed_entries(entries: Mapping[str, Any], packer: msgpack.Packer) -> Iterator[bytes]:
    return (packer.pack(name) + packer.pack(value) for name, value in entries.items())


def _ids(call: RenderCall, count: int) -> list[str]:
    request_id = call.envelope.request_id
    match call.request:
        case CompletionRequest():
            return completion_ids(request_id, count)
        case TokensRequest():
            return [f"tokens-{request_id}"]
    return [f"chatcmpl-{request_id}"]


def completion_ids(request_id: str, count: int) -> list[str]:
    """Ids of a completion's prompts, numbered where there are several."""
    if count == 1:
        return [f"cmpl-{request_id}"]
    return [f"cmpl-{request_id}-{number}" for number in range(count)]


def _generate_request(
    request_id: str,
    envelope: Envelope,
    sampling: SamplingRequest,
    prompt: RenderedPrompt,
    params: SamplingParams,
    codec: ItemCodec,
    form: AnswerForm,
    offsets: Offsets | None,
) -> _GenerateRequest:
    fields = {
        "request_id": request_id,
        "token_ids": prompt.token_ids,
        "token_offsets": offsets,
        "content_parts": None,
        "sampling_params": _sampling_params(sampling, params, envelope.stream),
        "model": envelope.model,
        "reasoning_ended": envelope.reasoning_ended,
        "reasoning_parser_kwargs": None,
        "return_token_ids": None,
        "output_mode": "tokens",
        "stream": envelope.stream,
        "stream_options": envelope.stream_options,
        "cache_salt": prompt.cache_salt,
        "priority": envelope.priority,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }
    if not prompt.items:
        return _GenerateRequest(fields, None, None)
    tensors = [item.tensors for item in prompt.items if item.tensors is not None]
    parts = [list(item_parts(own, codec.fields, codec.float_type)) for own in tensors]
    return _GenerateRequest(fields, _features(prompt.items, codec, form), parts or None)


def _features(items: Sequence[PromptItem], codec: ItemCodec, form: AnswerForm) -> dict[str, Any]:
    """Hashes, ranges and metadata by modality; metadata null in a layout.

    `mm_embed_runs` goes beyond vLLM's protocol, whose readers ignore it: null where every token of every range carries
    an embedding.
    """
    places = [{"offset": item.range.offset, "length": item.range.length} for item in items]
    tensors = [item.tensors for item in items if item.tensors is not None]
    written = pybase64.b64encode_as_string if form == "json" else bytes
    runs = [embed_runs(item.range.embed_mask) for item in items]
    metadata = [written(encoded) for own in tensors if (encoded := encode_metadata(own, codec.fields)) is not None]
    return {
        "mm_hashes": {"image": [item.mm_hash for item in items]},
        "mm_placeholders": {"image": places},
        "mm_embed_runs": {"image": runs} if any(run is not None for run in runs) else None,
        "mm_metadata": {"image": metadata} if metadata else None,
    }


def _sampling_params(sampling: SamplingRequest, params: SamplingParams, stream: bool) -> dict[str, Any]:
    """What an engine is told, in the words of the wire protocol; `max_tokens` always, whatever its value."""
    return {
        "n": sampling.n,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "seed": params.seed,
        "stop": sampling.stop,
        "stop_token_ids": params.stop_token_ids,
        "ignore_eos": params.ignore_eos,
        "max_tokens": params.max_tokens,
        "min_tokens": params.min_tokens,
        "logprobs": params.logprobs,
        "skip_special_tokens": sampling.skip_special_tokens,
        "include_stop_str_in_output": sampling.include_stop_str_in_output,
        "structured_outputs": _structured_outputs(params.structured),
        "output_kind": OUTPUT_DELTA if stream else OUTPUT_FINAL,
        **sampling.passed_on,
    }


def _structured_outputs(schema: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    return {"json": schema} if schema else {"json_object": True}

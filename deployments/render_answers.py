"""The answer to a render-only request over HTTP: everything that `generate` takes, as bytes, written once.

Both forms are the same object. Where JSON has the base64 of an item, MessagePack has its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import orjson
import pybase64

from deployments.answer_forms import AnswerForm
from deployments.calls import Envelope, RenderCall, SamplingRequest
from engine.protocol import SamplingParams
from renderer.conversation import CompletionRequest, TokensRequest
from renderer.embed_runs import embed_runs
from renderer.family import Field
from renderer.prompt import PromptItem, RenderedPrompt
from renderer.wire import FloatType, encode_item, encode_metadata

OUTPUT_DELTA, OUTPUT_FINAL = 1, 2


@dataclass(frozen=True, slots=True)
class ItemCodec:
    """How a model's items travel.

    Attributes:
        fields: How an engine joins the tensors of a batch, by tensor name.
        float_type: What float32 tensors become.
    """

    fields: Mapping[str, Field]
    float_type: FloatType = "bfloat16"


def render_answer(
    call: RenderCall,
    prompts: Sequence[RenderedPrompt],
    params: Sequence[SamplingParams],
    codec: ItemCodec,
) -> bytes:
    """One generate request for a chat or for token ids, a list of them for completions.

    Args:
        params: What an engine would be told, one for each prompt.
    """
    envelope, sampling = call.envelope, call.sampling
    single = not isinstance(call.request, CompletionRequest)
    ids = _ids(call, len(prompts))
    requests = [
        _generate_request(request_id, envelope, sampling, prompt, own, codec, call.form)
        for request_id, prompt, own in zip(ids, prompts, params, strict=True)
    ]
    answer = requests[0] if single else requests
    if call.form == "json":
        return orjson.dumps(answer)
    packed: bytes = msgpack.packb(answer)
    return packed


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
) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "token_ids": prompt.token_ids,
        "token_offsets": None,
        "features": _features(prompt.items, codec, form) if prompt.items else None,
        "content_parts": None,
        "sampling_params": _sampling_params(sampling, params, envelope.stream),
        "model": envelope.model,
        "reasoning_ended": None,
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


def _features(items: Sequence[PromptItem], codec: ItemCodec, form: AnswerForm) -> dict[str, Any]:
    """Hashes, ranges and tensors by modality; tensors and metadata null in a layout.

    `mm_embed_runs` goes beyond vLLM's protocol, whose readers ignore it: null where every token of every range carries
    an embedding.
    """
    places = [{"offset": item.range.offset, "length": item.range.length} for item in items]
    tensors = [item.tensors for item in items if item.tensors is not None]
    written = _base64 if form == "json" else bytes
    data = [written(encode_item(own, codec.fields, codec.float_type)) for own in tensors]
    runs = [embed_runs(item.range.embed_mask) for item in items]
    metadata = [written(encoded) for own in tensors if (encoded := encode_metadata(own, codec.fields)) is not None]
    return {
        "mm_hashes": {"image": [item.mm_hash for item in items]},
        "mm_placeholders": {"image": places},
        "mm_embed_runs": {"image": runs} if any(run is not None for run in runs) else None,
        "kwargs_data": {"image": data} if data else None,
        "mm_metadata": {"image": metadata} if metadata else None,
    }


def _base64(data: bytes) -> orjson.Fragment:
    """A JSON string of base64, which needs neither decoding nor escaping."""
    return orjson.Fragment(b'"' + pybase64.b64encode(data) + b'"')


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
    }


def _structured_outputs(schema: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    return {"json": schema} if schema else {"json_object": True}

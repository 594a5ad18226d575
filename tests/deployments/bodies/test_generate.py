"""Bodies of token-in/token-out: what a render tier writes, an engine tier reads, family by family; the rest by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from deployments.answers.rendered import ItemCodec, render_answer
from deployments.bodies.generate import GenerateBody
from deployments.bodies.strict import parse
from deployments.calls import Envelope, RenderCall, SamplingRequest
from deployments.sampling import resolve
from engine.embedded import EmbeddedEngine
from engine.protocol import SamplingParams
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, FeaturesRequest, TokensRequest
from renderer.errors import RequestError
from renderer.prompt import PlaceholderRange, RenderedPrompt
from renderer.renderer import Renderer
from tests.checkpoints import checkpoint
from tests.engine.builders import engine_config
from tests.goldens.cases import chat, image, user

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
CONVERSATION = chat(user("First", image("rgb-97x61.png"), "then", image("rgb-60x90.png"), "?"))
# Without tiles, which would be thousands of tokens.
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {},
    "qwen3_vl": {},
    "llava": {},
    "idefics3": {"do_image_splitting": False},
}
PIXELS = "data:image/png;base64,iVBORw0KGgo="


def as_rendered(renderer: Renderer, request: ChatRequest, masks: bool) -> GenerateBody:
    """The JSON of a render answer, read again; without our own field for the masks on demand, as vLLM writes it."""
    prompt = renderer.render_chat(request, skip_mm_cache=True)
    call = RenderCall(request, SamplingRequest(max_tokens=12, temperature=0), Envelope("x"), skip_mm_cache=True)
    codec = ItemCodec(renderer.family.fields, renderer.float_type)
    answer = json.loads(b"".join(render_answer(call, [prompt], [GREEDY], codec)))
    if not masks:
        del answer["features"]["mm_embed_runs"]
    return parse(GenerateBody, answer)


async def tokens(engine: EmbeddedEngine, prompt: RenderedPrompt) -> tuple[int, ...]:
    generated: tuple[int, ...] = ()
    async for output in engine.generate(prompt, GREEDY, request_id="test"):
        generated += output.token_ids
    return generated


async def answers(family: str) -> None:
    engine = EmbeddedEngine(engine_config(checkpoint(family), max_model_len=1536, kv_cache_bytes=2**24, max_num_seqs=2))
    await engine.start()
    # Floats travel whole, so that the engine computes the very same on both ways.
    config = RendererConfig(
        model=str(checkpoint(family)),
        max_model_len=1536,
        dtype="float32",
        media_threads=1,
        render_threads=1,
        mm_processor_kwargs=OPTIONS[family],
    )
    beside, apart = Renderer(config, engine.sender_cache), Renderer(config)
    try:
        spoken = await tokens(engine, beside.render_chat(CONVERSATION))
        for masks in (True, False):
            request = as_rendered(apart, CONVERSATION, masks).request()
            assert isinstance(request, FeaturesRequest)
            assert await tokens(engine, beside.receive(request)) == spoken
        stats = await engine.stats()
        assert stats.tensors_received == 4  # two as content, two as claims; the second claims need none
        assert len(engine.sender_cache.keys()) == 4
        assert engine.sender_cache.stats.pinned == 0
    finally:
        beside.close()
        apart.close()
        await engine.close()


@pytest.mark.parametrize("family", OPTIONS)
def test_a_render_answer_generates_what_the_conversation_does(family: str) -> None:
    asyncio.run(answers(family))


def body(**fields: Any) -> GenerateBody:
    return parse(GenerateBody, {"token_ids": [5, 6, 7], "sampling_params": {}, **fields})


def test_what_is_left_out_has_a_plain_default() -> None:
    params = resolve(body().sampling(), {"temperature": 0.3, "top_k": 20, "max_new_tokens": 9}, 3, 100)
    assert params == SamplingParams(max_tokens=9, temperature=1.0)
    assert resolve(body().sampling(), {}, 3, 100).max_tokens == 97


def test_every_sampling_field_arrives() -> None:
    fields: Mapping[str, Any] = {
        "n": 2, "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "seed": 7, "stop": ["a", "bc"],
        "stop_token_ids": [3], "ignore_eos": True, "logprobs": 2, "skip_special_tokens": False,
        "include_stop_str_in_output": True, "structured_outputs": {"json": {"type": "object"}},
    }  # fmt: skip
    sampling = body(sampling_params=fields).sampling()
    for name, value in fields.items():
        if name == "structured_outputs":
            assert sampling.structured == {"type": "object"}
        else:
            assert getattr(sampling, name) == (tuple(value) if isinstance(value, list) else value), name


def test_what_vllm_writes_of_its_own_is_taken() -> None:
    sampling = {
        "output_kind": 2, "skip_clone": True, "bad_words": [], "skip_reading_prefix_cache": False, "stop": ["END"],
        "output_text_buffer_length": 2,
    }  # fmt: skip
    body(
        sampling_params=sampling, token_offsets=None, features=None, content_parts=None, reasoning_ended=None,
        reasoning_parser_kwargs=None, return_token_ids=None, stream=False, stream_options=None, cache_salt=None,
        priority=0, kv_transfer_params=None, ec_transfer_params=None, model=None, output_mode="tokens",
    )  # fmt: skip


def test_text_is_made_only_where_it_is_needed() -> None:
    assert not body().sampling().detokenize
    assert body(sampling_params={"stop": ["a"]}).sampling().detokenize
    assert body(output_mode="text").sampling().detokenize
    with pytest.raises(RequestError):
        body(output_mode="text", sampling_params={"detokenize": False}).sampling()


@pytest.mark.parametrize(
    ("options", "schema"),
    [
        ({}, None),
        ({"json": None, "regex": None, "_backend": "x"}, None),
        ({"json": {"type": "object"}}, {"type": "object"}),
        ({"json": '{"type": "object"}', "disable_any_whitespace": True}, {"type": "object"}),
        ({"json_object": True}, {}),
    ],
)
def test_structured_outputs(options: dict[str, Any], schema: dict[str, Any] | None) -> None:
    sampling = body(sampling_params={"structured_outputs": options}).sampling()
    assert (sampling.structured, sampling.unfollowed, sampling.passed_on) == (schema, (), {})


@pytest.mark.parametrize("schema", ["{", "[1]", 5])
def test_a_schema_that_is_none_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError):
        body(sampling_params={"structured_outputs": {"json": schema}}).sampling()


def test_ids_alone_pass_unchanged() -> None:
    assert body().request() == FeaturesRequest((5, 6, 7), ())


def test_content_parts_are_images_with_one_token_each() -> None:
    request = body(content_parts=[{"type": "image_url", "url": PIXELS, "uuid": 7}], cache_salt="s").request()
    assert isinstance(request, TokensRequest)
    assert (request.token_ids, request.media[0].uuid, request.cache_salt) == ((5, 6, 7), "7", "s")


def test_features_and_content_parts_exclude_each_other() -> None:
    features = {"mm_hashes": {"image": ["a"]}, "mm_placeholders": {"image": [{"offset": 0, "length": 1}]}}
    with pytest.raises(RequestError):
        body(features=features, content_parts=[{"type": "image_url", "url": PIXELS}])


def test_handle_callers_give_bytes_and_arrays() -> None:
    places = [{"offset": 0, "length": 1}, {"offset": 1, "length": 2}]
    arrays = {"pixel_values": np.zeros(())}
    features = {
        "mm_hashes": {"image": ["a", "b"]},
        "mm_placeholders": {"image": places},
        "mm_embed_runs": {"image": [None, [[0, 1]]]},
        "kwargs_data": {"image": [b"\x80", arrays]},
    }
    request = body(features=features).request()
    assert isinstance(request, FeaturesRequest)
    first, second = request.items
    assert (first.data, first.range) == (b"\x80", PlaceholderRange(0, 1))
    assert second.data == arrays
    assert second.range == PlaceholderRange(1, 2, (True, False))

"""Token-in/token-out on the real stack: what the render tier answers, sent on to the engine tier."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from deployments.answers.tokens import TextTokenChoice
from deployments.client import Client, user
from renderer.errors import CacheMissError, RequestError, UnsupportedFieldError
from renderer.family import Field
from renderer.wire import encode_item
from tests.stack.helpers import ITEM_BYTES, TOKENS, Application, about, picture, wait_until

GENERATE = "/inference/v1/generate"
ABORT = "/inference/v1/abort_requests"
IMAGE = 766
FIELDS = {"pixel_values": Field("flat"), "image_grid_thw": Field("batched", keep_on_cpu=True)}
GREEDY = {"temperature": 0, "max_tokens": 40}
LONG = {"temperature": 0, "max_tokens": 700, "ignore_eos": True}


@pytest.fixture
def app(whole: Application) -> Application:
    return whole


def rendered(app: Application, *numbers: int, **options: Any) -> dict[str, Any]:
    body = {"messages": about(*(picture(number) for number in numbers)), **GREEDY, **options}
    response = app.post("/v1/chat/completions/render", body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(app: Application, answer: dict[str, Any]) -> str:
    """What a derender request makes of it."""
    ids = answer["choices"][0]["token_ids"]
    text: str = app.post("/detokenize", {"tokens": ids[:-1]}).json()["prompt"]
    return text


def test_a_render_answer_generates_what_chat_does(app: Application) -> None:
    chat = app.post("/v1/chat/completions", {"messages": about(picture(2), picture(5)), **GREEDY}).json()
    prompt = rendered(app, 2, 5)
    answer = app.post(GENERATE, prompt | {"return_token_ids": True}).json()
    choice = answer["choices"][0]
    assert answer["prompt_token_ids"] == prompt["token_ids"], "ids in are the ids out of rendering"
    assert text_of(app, answer) == chat["choices"][0]["message"]["content"]
    assert choice["finish_reason"] == chat["choices"][0]["finish_reason"]
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": len(choice["token_ids"])}]
    assert answer["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert [place["length"] for place in answer["mm_placeholders"]["image"]] == [TOKENS, TOKENS]
    assert answer["request_id"].startswith("generate-tokens-chatcmpl-")
    assert answer["output_mode"] == "tokens"


def test_content_parts_are_rendered_beside_the_engine(app: Application) -> None:
    answer = rendered(app, 3)
    place = answer["features"]["mm_placeholders"]["image"][0]
    ids = answer["token_ids"]
    once = [*ids[: place["offset"] + 1], *ids[place["offset"] + place["length"] :]]
    body = {
        "token_ids": once,
        "content_parts": [{"type": "image_url", "url": picture(3).url}],
        "sampling_params": GREEDY,
        "output_mode": "text",
        "return_token_ids": True,
    }
    app.clear()
    got = app.post(GENERATE, body).json()
    assert picture(3).color in got["choices"][0]["text"]
    assert got["prompt_token_ids"] == ids
    assert got["mm_placeholders"] == {"image": [place]}
    assert app.cache("engine", "sender").entries == 1
    again = app.post("/v1/chat/completions", {"messages": about(picture(3)), **GREEDY}).json()
    assert again["choices"][0]["message"]["content"] == got["choices"][0]["text"]
    assert app.cache("engine", "sender").hits == 1


def test_content_parts_are_answered_the_same_as_a_stream(app: Application) -> None:
    ids = app.post("/tokenize", {"messages": about(picture(4))}).json()["tokens"]
    place = ids.index(IMAGE)
    body = {
        "token_ids": [*ids[: place + 1], *ids[place + TOKENS :]],
        "content_parts": [{"type": "image_url", "url": picture(4).url}],
        "sampling_params": GREEDY,
        "output_mode": "text",
    }
    whole = app.post(GENERATE, body).json()["choices"][0]
    assert picture(4).color in whole["text"]
    choices = [chunk["choices"][0] for chunk in streamed(app, body)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "stop"


def test_n_choices_are_those_of_n_seeds_whole_and_as_a_stream(app: Application) -> None:
    prompt = rendered(app, 6)

    def asked(**sampling: int) -> dict[str, Any]:
        return prompt | {"sampling_params": {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True, **sampling}}

    alone = [app.post(GENERATE, asked(seed=3 + index)).json()["choices"][0]["token_ids"] for index in range(3)]
    whole = app.post(GENERATE, asked(seed=3, n=3)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [choice["token_ids"] for choice in whole["choices"]] == alone
    assert len({tuple(ids) for ids in alone}) == 3
    assert whole["usage"]["completion_tokens"] == 36
    pieces: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in streamed(app, asked(seed=3, n=3)):
        for choice in chunk["choices"]:
            pieces[choice["index"]] += choice["token_ids"]
    assert [pieces[index] for index in range(3)] == alone


def streamed(app: Application, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of the same request's stream."""
    with app.http.stream("POST", GENERATE, json=body | {"stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_brings_the_same_tokens_piece_by_piece(app: Application) -> None:
    body = rendered(app, 1) | {"sampling_params": {**GREEDY, "logprobs": 2, "n": 1}}
    whole = app.post(GENERATE, body).json()["choices"][0]
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    with app.http.stream("POST", GENERATE, json=body | options) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    assert [entry for choice in choices for entry in choice["logprobs"]["content"]] == whole["logprobs"]["content"]
    assert chunks[0]["prompt_token_ids"] == body["token_ids"]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["weight_versions"] == whole["weight_versions"]
    assert all(choice["weight_versions"] is None for choice in choices[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(whole["token_ids"])


def test_logprobs_begin_with_the_sampled_token(app: Application) -> None:
    body = {
        "token_ids": [10, 11, 12],
        "sampling_params": {"temperature": 1.5, "seed": 3, "max_tokens": 8, "logprobs": 2},
    }
    choice = app.post(GENERATE, body).json()["choices"][0]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
    for token, entry in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True):
        first = entry["top_logprobs"][0]
        assert token == entry["token_id"] == first["token_id"]
        assert (entry["logprob"], entry["rank"]) == (first["logprob"], first["rank"])
        ranks = [top["rank"] for top in entry["top_logprobs"]]
        assert set(ranks) == {1, 2, entry["rank"]}
    assert app.post(GENERATE, body).json()["choices"][0]["token_ids"] == choice["token_ids"]


def test_text_mode_has_openais_logprobs(app: Application) -> None:
    body = {
        "token_ids": [10, 11, 12],
        "output_mode": "text",
        "sampling_params": {**GREEDY, "max_tokens": 3, "logprobs": 1},
    }
    choice = app.post(GENERATE, body).json()["choices"][0]
    assert {"token", "bytes", "logprob", "top_logprobs"} == set(choice["logprobs"]["content"][0])
    assert isinstance(choice["text"], str)


def test_without_max_tokens_the_checkpoints_own_limit_counts(app: Application) -> None:
    limit = json.loads(Path("demo/model/generation_config.json").read_text())["max_new_tokens"]
    body = {"token_ids": [10, 11, 12], "sampling_params": {"temperature": 0, "ignore_eos": True}}
    assert app.post(GENERATE, body).json()["usage"]["completion_tokens"] == limit


def test_a_known_item_needs_no_data_and_an_unknown_one_is_refused(app: Application) -> None:
    app.clear()
    body = rendered(app, 4)
    known = copy.deepcopy(body)
    known["features"]["kwargs_data"] = None
    assert app.post(GENERATE, known).status_code == 400
    first = app.post(GENERATE, body).json()
    assert app.post(GENERATE, known).json()["choices"] == first["choices"]
    assert app.cache("engine", "sender").hits == 1
    assert app.post(GENERATE, known | {"cache_salt": "another tenant"}).status_code == 400


def test_a_claim_never_answers_for_content(app: Application) -> None:
    """The hash of one picture on the tensors of another."""
    app.clear()
    lie, truth = rendered(app, 0), rendered(app, 1)
    lie["features"]["mm_hashes"] = truth["features"]["mm_hashes"]
    assert picture(0).color in text_of(app, app.post(GENERATE, lie).json())
    chat = app.post("/v1/chat/completions", {"messages": about(picture(1)), **GREEDY}).json()
    assert picture(1).color in chat["choices"][0]["message"]["content"]
    other = app.post(GENERATE, truth | {"cache_salt": "another tenant"}).json()
    assert picture(1).color in text_of(app, other)


def tensors(number: int) -> dict[str, Any]:
    """Of the right shapes; what they show does not matter."""
    side = 16
    pixels = np.random.default_rng(number).integers(0, 256, (side * side, 1176), dtype=np.uint8)
    return {"pixel_values": pixels, "image_grid_thw": np.array([1, side, side])}


def item(changed: dict[str, Any], **fields: Field) -> str:
    return base64.b64encode(encode_item(tensors(0) | changed, FIELDS | fields)).decode()


def with_data(data: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["features"]["kwargs_data"] = {"image": [data]}

    return change


def moved(offset: int, length: int = TOKENS) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["features"]["mm_placeholders"] = {"image": [{"offset": offset, "length": length}]}

    return change


def twice(body: dict[str, Any]) -> None:
    for entries in body["features"].values():
        if entries is not None:
            entries["image"] = entries["image"] * 2


def more_image_tokens(body: dict[str, Any]) -> None:
    body["token_ids"] = [*body["token_ids"], IMAGE]


MALFORMED: dict[str, Callable[[dict[str, Any]], None]] = {
    "dtype": with_data(item({"pixel_values": tensors(0)["pixel_values"].astype(np.int32)})),
    "shape": with_data(item({"pixel_values": tensors(0)["pixel_values"][:, :-1]})),
    "rows": with_data(item({"pixel_values": tensors(0)["pixel_values"][:-4]})),
    "grid": with_data(item({"image_grid_thw": np.array([1, 8, 16])})),
    "a grid of nothing": with_data(
        item({"image_grid_thw": np.array([1, 0, 0]), "pixel_values": np.zeros((0, 1176), np.uint8)})
    ),
    "a grid beyond all": with_data(item({"image_grid_thw": np.array([1, 2**40, 2**40])})),
    "field kind": with_data(item({}, pixel_values=Field("batched"))),
    "numbers that are none": with_data(item({"pixel_values": np.full((256, 1176), np.nan, np.float32)})),
    "another tensor": with_data(item({"more": np.zeros(1, np.uint8)}, more=Field("batched"))),
    "no base64": with_data("***"),
    "no MessagePack": with_data(base64.b64encode(b"\xc1" * 9).decode()),
    "a null that is not held": with_data(None),
    "range beyond the prompt": moved(10_000),
    "range elsewhere": moved(0),
    "too short a range": moved(5, TOKENS - 8),
    "overlapping ranges": twice,
    "an image token without an item": more_image_tokens,
}


async def test_malformed_items_are_refused_and_cost_nobody_else_anything(app: Application) -> None:
    app.clear()
    body = rendered(app, 6)
    story = {"messages": about(picture(7), text="Tell me a story."), **LONG}
    undisturbed = app.post("/v1/chat/completions", story).json()["choices"][0]["message"]["content"]
    restarts = (await asyncio.to_thread(app.report, "engine")).engine
    async with httpx.AsyncClient(base_url=app.url, timeout=120) as http:
        streams = [asyncio.create_task(http.post("/v1/chat/completions", json=story)) for _ in range(4)]
        for name, change in MALFORMED.items():
            broken = copy.deepcopy(body)
            broken["features"]["mm_hashes"] = {"image": [name]}
            change(broken)
            response = await http.post(GENERATE, json=broken)
            assert response.status_code == 400, (name, response.text)
            assert response.json()["error"]["param"] in ("features", "token_ids"), (name, response.text)
        for stream in streams:
            assert (await stream).json()["choices"][0]["message"]["content"] == undisturbed
    now = (await asyncio.to_thread(app.report, "engine")).engine
    assert now is not None
    assert restarts is not None
    assert now.restarts == restarts.restarts
    assert app.post(GENERATE, body).status_code == 200


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"token_ids": []}, "body.token_ids"),
        ({"token_ids": [-1]}, "body.token_ids.0"),
        ({"token_ids": [10**7]}, "prompt"),
        ({"token_ids": [IMAGE]}, "token_ids"),
        ({"sampling_params": None}, "body.sampling_params"),
        ({"sampling_params": {"logit_bias": {"3": 1}}}, "logit_bias"),
        ({"sampling_params": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"sampling_params": {"colour": "red"}}, "colour"),
        ({"sampling_params": {"structured_outputs": {"regex": "a+"}}}, "structured_outputs"),
        ({"sampling_params": {"detokenize": False, "stop": ["a"]}}, "detokenize"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling_params": {"temperature": 3}}, "temperature"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"output_mode": "speech"}, "body.output_mode"),
        ({"content_parts": [{"type": "audio_url", "url": "data:,"}]}, "content_parts.0.type"),
        ({"content_parts": [{"type": "image_url"}]}, "image_url"),
        ({"features": {"mm_hashes": {"image": ["a"]}, "mm_placeholders": {"image": []}}}, "features"),
        ({"features": {"mm_hashes": {"video": ["a"]}, "mm_placeholders": {"video": []}}}, "features"),
        ({"features": {"mm_hashes": {"image": ["a"]}, "mm_placeholders": {"image": [{"offset": 0, "length": 0}]}}},
         "body.features.mm_placeholders.image.0.length"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(app: Application, changed: dict[str, Any], param: str) -> None:
    response = app.post(GENERATE, {"token_ids": [10, 11], "sampling_params": {"max_tokens": 1}, **changed})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


def test_an_unknown_model_is_not_found(app: Application) -> None:
    body = {"token_ids": [10], "sampling_params": {}, "model": "another"}
    assert app.post(GENERATE, body).status_code == 404


async def test_abort_ends_a_request_by_its_id(app: Application) -> None:
    async with httpx.AsyncClient(base_url=app.url, timeout=60) as http:
        body = {"token_ids": [10, 11], "sampling_params": LONG, "request_id": "mine", "stream": True}
        chunks = []
        async with http.stream("POST", GENERATE, json=body) as response:
            async for line in response.aiter_lines():
                if not line or line.endswith("[DONE]"):
                    continue
                chunks.append(json.loads(line.removeprefix("data: ")))
                if len(chunks) == 1:
                    assert (await http.post(ABORT, json={"request_ids": ["mine", "unknown"]})).status_code == 200
        assert chunks[-1]["choices"][0]["finish_reason"] == "abort"
        assert len(chunks) < LONG["max_tokens"]
        assert (await http.post(ABORT, json={})).status_code == 400


def test_abort_takes_the_id_that_a_chat_answer_shows(app: Application) -> None:
    with app.http.stream(
        "POST", "/v1/chat/completions", json={"messages": about(picture(0)), **LONG, "stream": True}
    ) as response:
        lines = response.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert app.post(ABORT, {"request_ids": [first["id"]]}).status_code == 200
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line and not line.endswith("[DONE]")]
    assert events[-1]["choices"][0]["finish_reason"] == "abort"
    wait_until(lambda: running(app) == 0, 10, "nothing runs")


def running(app: Application) -> int:
    engine = app.report("engine").engine
    assert engine is not None
    return engine.running + engine.waiting


async def test_the_typed_client_generates_from_what_it_rendered(app: Application) -> None:
    app.clear()
    client = Client(handle=app.handle)
    messages = [user("What colour is the shape?", picture(3).png)]
    prompt = await client.render_chat(messages)
    answer = await client.generate(prompt, GREEDY, output_mode="text")
    chat = await client.chat(messages, **GREEDY)
    (choice,) = answer.choices
    assert isinstance(choice, TextTokenChoice)
    assert choice.text == chat.choices[0].message.content
    chunks = [chunk async for chunk in client.generate_stream(prompt, GREEDY)]
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == list(choice.token_ids)
    layout = await client.layout(messages)
    again = await client.generate(layout, GREEDY)
    assert again.choices[0].token_ids == choice.token_ids
    held = await asyncio.to_thread(app.cache, "engine", "sender")
    assert held.bytes == 2 * ITEM_BYTES  # one as content, one as a claim
    with pytest.raises(CacheMissError):
        await client.generate(layout, GREEDY, cache_salt="another")
    with pytest.raises(RequestError):
        await client.generate([IMAGE], GREEDY)
    with pytest.raises(UnsupportedFieldError):
        await client.generate([10], {"colour": "red"})


async def test_the_typed_client_aborts(app: Application) -> None:
    client = Client(handle=app.handle)
    tokens: list[int] = []
    reason = None
    async for chunk in client.generate_stream([10, 11], LONG, request_id="to end"):
        if not tokens:
            await client.abort("to end")
        tokens += chunk.choices[0].token_ids
        reason = chunk.choices[0].finish_reason
    assert reason == "abort"
    assert len(tokens) < LONG["max_tokens"]


async def test_a_stream_of_tokens_goes_on_when_the_engine_core_is_killed(app: Application) -> None:
    body = rendered(app, 8) | {"sampling_params": LONG}
    undisturbed = (await asyncio.to_thread(app.post, GENERATE, body)).json()["choices"][0]
    replica = psutil.Process((await asyncio.to_thread(app.report, "engine")).pid)
    cores = [child for child in replica.children(recursive=True) if "engine.core" in " ".join(child.cmdline())]
    tokens: list[int] = []
    async with (
        httpx.AsyncClient(base_url=app.url, timeout=120) as http,
        http.stream("POST", GENERATE, json=body | {"stream": True}) as response,
    ):
        async for line in response.aiter_lines():
            if not line or line.endswith("[DONE]"):
                continue
            if len(tokens) > 5 and cores:
                cores.pop().kill()
            tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
    assert not cores
    assert tokens == undisturbed["token_ids"]

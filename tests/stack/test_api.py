"""The OpenAI API as its own client sees it, and errors in its form."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from deployments.answers.openai import ChatCompletion
from deployments.client import Client, user
from renderer.errors import MediaError, UnsupportedFieldError
from tests.stack.helpers import TOKENS, Application, about, picture

MODEL = "demo/model"
HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture
def app(whole: Application) -> Application:
    return whole


@pytest.fixture
def messages() -> Any:
    return about(picture(0))


def test_the_openai_client_gets_an_answer(app: Application, messages: Any) -> None:
    with app.openai() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, user="me", metadata={"a": "b"}, store=False
        )
    assert picture(0).color in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > TOKENS


def test_the_openai_client_gets_the_same_answer_as_a_stream(app: Application, messages: Any) -> None:
    with app.openai() as client:
        plain = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert plain.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_second_turn_is_served_from_the_prefix_cache(app: Application, messages: Any) -> None:
    with app.openai() as client:
        client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
        again = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) > TOKENS // 2


def test_n_choices_of_a_seeded_request_differ_and_come_again(app: Application) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "n": 4, "seed": 7, "temperature": 1.5}
    first, second = (app.post("/v1/chat/completions", {**body, "max_tokens": 24}).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    assert len(set(texts)) > 1
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2, 3]
    assert first["usage"]["completion_tokens"] > 24


def test_a_stop_string_ends_the_text_before_it(app: Application) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}
    whole = app.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    word = whole.split()[8]
    choice = app.post("/v1/chat/completions", {**body, "stop": word}).json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(word)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", word)


def test_max_tokens_ends_with_length(app: Application) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_completion_tokens": 5}
    answer = app.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


def test_a_schema_is_followed_to_its_last_character(app: Application, messages: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"shape": {"enum": ["circle", "square"]}, "sure": {"type": "boolean"}},
        "required": ["shape", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    body = {"messages": messages, "response_format": form, "temperature": 1, "seed": 5, "max_tokens": 64}
    (choice,) = app.post("/v1/chat/completions", body).json()["choices"]
    answer = json.loads(choice["message"]["content"])
    assert set(answer) == {"shape", "sure"}
    assert choice["finish_reason"] == "stop"
    streamed = app.call("chat_completions", body)
    assert streamed.choices[0].message.content == choice["message"]["content"]


def test_a_token_id_that_no_model_has_is_the_callers_fault(app: Application) -> None:
    for token_id in (100_000, 3_000_000_000, 2**32):
        response = app.post("/v1/completions", {"prompt": [token_id], "max_tokens": 1})
        assert response.status_code == 400, token_id
        assert response.json()["error"]["param"]


def test_completions_take_several_prompts(app: Application) -> None:
    body = {"prompt": ["One", "Two"], "n": 2, "seed": 1, "max_tokens": 4, "ignore_eos": True}
    answer = app.post("/v1/completions", body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 16


def test_a_streamed_completion_is_the_plain_one(app: Application) -> None:
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 0}
    plain = app.post("/v1/completions", body).json()["choices"][0]["text"]
    lines = app.post("/v1/completions", {**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == plain
    assert lines[-2:] == ["data: [DONE]", ""]


def test_logprobs_are_those_of_the_tokens(app: Application, messages: Any) -> None:
    body = {"messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = app.post("/v1/chat/completions", body).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).startswith(choice["message"]["content"])
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries), "greedy takes the likeliest"


def test_answers_say_who_served_them_and_how_long_it_took(app: Application, messages: Any) -> None:
    generated = app.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    streamed = app.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1, "stream": True})
    rendered = app.post("/v1/chat/completions/render", {"messages": messages})
    tiers = app.tiers()
    for response, tier in ((generated, "engine"), (streamed, "engine"), (rendered, "render")):
        assert response.headers["x-greenroom-tier"] == tier
        assert response.headers["x-greenroom-replica"] == tiers[tier][0].replica
        assert "render;dur=" in response.headers["server-timing"]
        assert response.headers["x-request-id"]
    assert app.post("/v1/chat/completions", {}).headers["x-greenroom-tier"] == "router"


def test_the_clients_request_id_comes_back(app: Application, messages: Any) -> None:
    response = app.http.post(
        "/v1/chat/completions/render", json={"messages": messages}, headers={"X-Request-Id": "mine"}
    )
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["request_id"] == "chatcmpl-mine"


def test_a_render_answer_always_says_max_tokens(app: Application) -> None:
    requests = app.post("/v1/completions/render", {"prompt": ["one", "two words"]}).json()
    assert [request["sampling_params"]["max_tokens"] for request in requests] == [16, 16]


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "param"),
    [
        ("/v1/chat/completions", {"messages": [], "colour": 1}, 400, "BadRequestError", "colour"),
        ("/v1/chat/completions", {"messages": [HELLO], "logit_bias": {"1": 2}}, 400, "BadRequestError", "logit_bias"),
        ("/v1/chat/completions", {}, 400, "Bad Request", "body.messages"),
        ("/v1/chat/completions", {"max_tokens": "x"}, 400, "Bad Request", "body.messages"),
        (
            "/v1/chat/completions",
            {"messages": [HELLO], "prompt_logprobs": 1},
            400,
            "BadRequestError",
            "prompt_logprobs",
        ),
        ("/v1/chat/completions/render", {"model": "other"}, 400, "Bad Request", "body.messages"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "NotFoundError", "model"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "BadRequestError", "max_tokens"),
        ("/v1/completions", {"prompt": "a", "temperature": 3}, 400, "BadRequestError", "temperature"),
        ("/v1/completions", {"prompt": [1, -1]}, 400, "Bad Request", "body.prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 99999}, 400, "BadRequestError", "max_tokens"),
        ("/tokenize", {}, 400, "Bad Request", "body.prompt"),
        ("/detokenize", {"tokens": [-1]}, 400, "Bad Request", "body.tokens.0"),
        ("/nowhere", {}, 404, "NotFoundError", None),
    ],
)
def test_a_bad_request_is_named_in_openais_form(
    app: Application, path: str, body: dict[str, Any], status: int, kind: str, param: str | None
) -> None:
    response = app.post(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"], error["code"]) == (status, kind, param, status)
    assert error["message"]


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,@@@", "data:image/png,plain", "data:image/png;base64", "ftp://127.0.0.1/a.png", "a.png"],
)
def test_an_image_that_cannot_be_used_is_named_by_its_place(app: Application, url: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in (picture(0).url, url)]
    for path in ("/v1/chat/completions", "/v1/chat/completions/render", "/tokenize"):
        response = app.post(path, {"messages": [{"role": "user", "content": parts}]})
        assert response.status_code == 400, response.text
        assert "image 1" in response.json()["error"]["message"]


def test_bytes_that_are_no_image_are_the_callers_fault(app: Application) -> None:
    for path in ("/v1/chat/completions", "/v1/chat/completions/render"):
        response = app.post(path, {"messages": user_with_bytes(b"no image")})
        assert response.status_code == 400, response.text
        assert "image 0" in response.json()["error"]["message"]


def test_the_openai_client_raises_its_own_error(app: Application, messages: Any) -> None:
    with app.openai() as client, pytest.raises(openai.BadRequestError, match="nonsense"):
        client.chat.completions.create(model=MODEL, messages=messages, extra_body={"nonsense": 1})


def test_a_body_larger_than_a_message_between_replicas_is_served(app: Application) -> None:
    padded = picture(0).png + bytes(4 * 2**20)  # readers of PNG stop at its end mark
    for path, answer in (("/v1/chat/completions", "usage"), ("/v1/chat/completions/render", "token_ids")):
        response = app.post(path, {"messages": user_with_bytes(padded), "max_tokens": 1})
        assert response.status_code == 200, response.text
        assert answer in response.json()


async def test_the_typed_client_does_what_http_does(app: Application) -> None:
    client = Client(handle=app.handle)
    messages = [user("What colour is the shape?", picture(3).png)]
    answer: ChatCompletion = await client.chat(messages, temperature=0)
    chunks = [chunk async for chunk in client.chat_stream(messages, temperature=0)]
    assert picture(3).color in answer.choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.get("content", "") for chunk in chunks)
    assert streamed == answer.choices[0].message.content
    prompt = await client.render_chat(messages)
    assert prompt.layout() == await client.layout(messages)
    assert (await client.tokenize(messages=messages)).tokens == prompt.token_ids
    assert await client.detokenize((await client.tokenize("Hello there")).tokens) == "Hello there"


async def test_errors_reach_the_typed_client_as_our_own_classes(app: Application) -> None:
    client = Client(handle=app.handle)
    with pytest.raises(UnsupportedFieldError) as unsupported:
        await client.chat([user("Hello")], colour="red")
    assert unsupported.value.param == "colour"
    with pytest.raises(MediaError) as media:
        await client.render_chat([user("Hello", picture(0).png, b"no image")])
    assert media.value.index == 1
    with pytest.raises(MediaError):
        async for _ in client.chat_stream([user("Hello", b"no image")]):
            pass


def user_with_bytes(data: bytes) -> list[dict[str, Any]]:
    return [user("What colour is the shape?", data)]

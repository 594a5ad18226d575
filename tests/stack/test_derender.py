"""Render, generate, derender: three calls, in three places, that together are a chat completion."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.stack.helpers import Application, about, picture

CHAT = "/v1/chat/completions"


@pytest.fixture
def rendered(whole: Application) -> dict[str, Any]:
    """A generate request about a picture."""
    response = whole.post(f"{CHAT}/render", {"messages": about(picture(2)), "temperature": 0})
    assert response.status_code == 200, response.text
    request: dict[str, Any] = response.json()
    return request


@pytest.fixture
def expected(whole: Application) -> dict[str, Any]:
    """What the chat itself answers."""
    answer: dict[str, Any] = whole.post(CHAT, {"messages": about(picture(2)), "temperature": 0}).json()
    return answer


def test_the_three_calls_give_the_chats_answer(
    whole: Application, render_only: Application, rendered: dict[str, Any], expected: dict[str, Any]
) -> None:
    generated = whole.post("/inference/v1/generate", rendered)
    assert generated.status_code == 200, generated.text
    body = {"generate_response": generated.json(), "prompt_token_ids": rendered["token_ids"]}
    for app in (whole, render_only):
        answer = app.post(f"{CHAT}/derender", body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-greenroom-tier"] == "render"
        (choice,) = answer.json()["choices"]
        assert choice["message"]["content"] == expected["choices"][0]["message"]["content"]
        assert choice["finish_reason"] == "stop"
        assert answer.json()["usage"]["total_tokens"] == expected["usage"]["total_tokens"]
    assert whole.call("derender_chat", body).choices[0].message.content == choice["message"]["content"]


def test_a_stream_is_derendered_by_whoever_comes_along(
    whole: Application, render_only: Application, rendered: dict[str, Any], expected: dict[str, Any]
) -> None:
    lines = whole.post("/inference/v1/generate", {**rendered, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    state, text = None, ""
    for place, chunk in enumerate(chunks):
        body = {
            "stream": True,
            "generate_chunk": chunk,
            "stream_state": state,
            "prompt_token_ids": rendered["token_ids"],
        }
        answer = (whole, render_only)[place % 2].post(f"{CHAT}/derender", body).json()
        state = answer["stream_state"]
        text += "".join(choice["delta"].get("content") or "" for choice in answer["chunk"]["choices"])
    assert text == expected["choices"][0]["message"]["content"]


def test_token_ids_with_raw_images_are_rendered_to_what_their_chat_is(
    whole: Application, rendered: dict[str, Any]
) -> None:
    (place,) = rendered["features"]["mm_placeholders"]["image"]
    ids = rendered["token_ids"]
    unexpanded = [*ids[: place["offset"] + 1], *ids[place["offset"] + place["length"] :]]
    parts = [{"type": "image_url", "url": picture(2).url}]
    body = {"token_ids": unexpanded, "content_parts": parts, "sampling_params": {"temperature": 0}}
    again = whole.post("/inference/v1/generate/render", body)
    assert again.status_code == 200, again.text
    assert (again.json()["token_ids"], again.json()["features"]) == (ids, rendered["features"])

"""Token ids with one placeholder an item, and the items: what a chat of the same tokens is rendered to."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from deployments.config import GreenroomConfig
from deployments.operations import Operations
from tests.stack.helpers import TOKENS, about, picture

CONFIG = GreenroomConfig.model_validate(
    {"model": "demo/model", "renderer": {"media_threads": 1, "render_threads": 1}, "engine": None}
)
PATH, CHAT = "/inference/v1/generate/render", "/v1/chat/completions/render"


def unexpanded(token_ids: list[int], features: dict[str, Any]) -> list[int]:
    """A rendered prompt's ids with one placeholder an item again."""
    ids = list(token_ids)
    for place in reversed(features["mm_placeholders"]["image"]):
        ids[place["offset"] : place["offset"] + place["length"]] = [ids[place["offset"]]]
    return ids


def parts(*numbers: int) -> list[dict[str, Any]]:
    return [{"type": "image_url", "url": picture(number).url} for number in numbers]


async def test_token_ids_and_images_give_what_their_chat_gives(http: httpx.AsyncClient) -> None:
    chat = (await http.post(CHAT, json={"messages": about(picture(0), picture(1)), "temperature": 0})).json()
    ids = unexpanded(chat["token_ids"], chat["features"])
    assert len(ids) == len(chat["token_ids"]) - 2 * (TOKENS - 1)
    body = {
        "token_ids": ids,
        "content_parts": parts(0, 1),
        "sampling_params": {"temperature": 0},
        "request_id": "mine",
        "cache_salt": "s",
        "priority": 2,
    }
    response = await http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    for name in ("token_ids", "features"):
        assert answer[name] == chat[name]
    assert answer["sampling_params"]["temperature"] == 0
    assert answer["sampling_params"]["max_tokens"] == chat["sampling_params"]["max_tokens"]
    assert (answer["request_id"], answer["cache_salt"], answer["priority"]) == ("tokens-mine", "s", 2)


async def test_a_layout_has_the_same_tokens_and_no_tensors(http: httpx.AsyncClient) -> None:
    chat = (await http.post(CHAT, json={"messages": about(picture(0)), "mm_payload": "none"})).json()
    ids = unexpanded(chat["token_ids"], chat["features"])
    body = {"token_ids": ids, "content_parts": parts(0), "sampling_params": {}, "mm_payload": "none"}
    answer = (await http.post(PATH, json=body)).json()
    assert (answer["token_ids"], answer["features"]) == (chat["token_ids"], chat["features"])
    assert answer["features"]["kwargs_data"] is None


async def test_an_item_known_by_its_uuid_need_not_be_sent_again(http: httpx.AsyncClient) -> None:
    chat = (await http.post(CHAT, json={"messages": about(picture(3))})).json()
    ids = unexpanded(chat["token_ids"], chat["features"])
    sent = {"token_ids": ids, "content_parts": [{**parts(3)[0], "uuid": "third"}], "sampling_params": {}}
    known = {**sent, "content_parts": [{"type": "image_url", "uuid": "third"}]}
    first = (await http.post(PATH, json=sent)).json()
    again = await http.post(PATH, json=known)
    assert again.status_code == 200, again.text
    assert again.json()["features"] == first["features"]
    assert first["features"]["mm_hashes"]["image"] == ["third"]


async def test_text_alone_passes_unchanged(http: httpx.AsyncClient) -> None:
    answer = (await http.post(PATH, json={"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 16}})).json()
    assert (answer["token_ids"], answer["features"]) == ([1, 2, 3], None)
    assert answer["sampling_params"]["max_tokens"] == 16


async def test_the_handles_method_gives_the_prompt_itself(operations: Operations) -> None:
    chat = await operations.render_chat({"messages": about(picture(0))})
    (item,) = chat.items
    ids = [*chat.token_ids[: item.range.offset + 1], *chat.token_ids[item.range.end :]]
    prompt = await operations.render_tokens({"token_ids": ids, "content_parts": parts(0), "sampling_params": {}})
    assert prompt.token_ids == chat.token_ids
    assert prompt.items[0].mm_hash == item.mm_hash
    assert prompt.items[0].tensors is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"token_ids": []}, "body.token_ids"),
        ({"token_ids": [-1]}, "body.token_ids.0"),
        ({"sampling_params": None}, "body.sampling_params"),
        ({"content_parts": parts(0)}, "token_ids"),
        ({"content_parts": [{"type": "text", "text": "a"}]}, "content_parts.0.type"),
        ({"content_parts": [{"type": "image_url"}]}, "image_url"),
        ({"features": {"mm_hashes": {}, "mm_placeholders": {}}}, "features"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
        ({"colour": 1}, "colour"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
    ],
)
async def test_what_cannot_be_rendered_names_its_field(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await http.post(PATH, json={"token_ids": [1], "sampling_params": {}, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text

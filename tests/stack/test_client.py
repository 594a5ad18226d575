"""The typed client, from a program outside of the application."""

from __future__ import annotations

import numpy as np
import pytest

from deployments.client import Client, user
from renderer.errors import MediaError, RequestError
from tests.stack.helpers import QUESTION, Application, picture


@pytest.fixture
def client(whole: Application) -> Client:
    return Client(handle=whole.handle)


async def test_tensors_are_views_of_shared_memory_that_nobody_can_change(client: Client) -> None:
    prompt = await client.render_chat([user(QUESTION, picture(0).png, picture(1).png)])
    assert len(prompt.items) == 2
    for item in prompt.items:
        assert item.tensors is not None
        for tensor in item.tensors.values():
            assert isinstance(tensor, np.ndarray)
            assert not tensor.flags.writeable
            assert not tensor.flags.owndata


async def test_ids_and_images_give_what_their_messages_give(client: Client) -> None:
    chat = await client.render_chat([user(QUESTION, picture(0).png)])
    (item,) = chat.items
    ids = (*chat.token_ids[: item.range.offset + 1], *chat.token_ids[item.range.end :])
    prompt = await client.render_tokens(ids, [picture(0).png])
    assert prompt.layout() == chat.layout()
    answer = await client.generate(prompt, {"temperature": 0, "max_tokens": 12})
    assert picture(0).color in await client.detokenize(answer.choices[0].token_ids)


async def test_texts_are_rendered_completed_and_tokenized_as_one(client: Client) -> None:
    ids = (await client.tokenize("Hello there")).tokens
    (prompt,) = await client.render_completion("Hello there")
    assert prompt.token_ids == tuple(ids)
    assert [each.token_ids for each in await client.render_completion([list(ids), [1, 2]])] == [tuple(ids), (1, 2)]
    answer = await client.completion("Hello there", temperature=0, max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    (card,) = (await client.models()).data
    assert card.id == "demo/model"


async def test_errors_arrive_as_what_they_are(client: Client) -> None:
    with pytest.raises(MediaError) as corrupt:
        await client.render_chat([user(QUESTION, picture(0).png, b"no image")])
    assert (corrupt.value.index, corrupt.value.status) == (1, 400)
    with pytest.raises(RequestError) as field:
        await client.chat([user("Hello")], temperature="warm")
    assert field.value.param == "body.temperature"
    with pytest.raises(RequestError):
        async for _ in client.chat_stream([user("Hello")], top_p=7):
            pass

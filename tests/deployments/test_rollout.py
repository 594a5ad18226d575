"""Turns of a conversation as ids: against the same conversation rendered at once, by a real renderer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from deployments.answers.openai import PromptTokensDetails, Usage
from deployments.answers.tokens import TokenAnswer, TokenChoice
from deployments.bodies.chat import RenderChatBody
from deployments.bodies.strict import parse
from deployments.rollout import Rollout
from renderer.errors import RequestError
from renderer.prompt import RenderedPrompt
from renderer.renderer import Renderer
from tests.renderer.builders import demo_renderer
from tests.stack.helpers import about, picture

END = "<|im_end|>"


class Local:
    """A client of a renderer in this process; what an engine would answer is scripted."""

    def __init__(self, renderer: Renderer, *answers: str) -> None:
        self.renderer = renderer
        self.answers = list(answers)
        self.asked: list[RenderedPrompt] = []

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedPrompt:
        body = parse(RenderChatBody, {"messages": messages, **options})
        return self.renderer.render_chat(body.request(), skip_mm_cache=True)

    async def layout(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedPrompt:
        return (await self.render_chat(messages, **options)).layout()

    async def generate(
        self, prompt: RenderedPrompt | Sequence[int], sampling: Mapping[str, Any] | None = None, **options: Any
    ) -> TokenAnswer:
        assert isinstance(prompt, RenderedPrompt)
        self.asked.append(prompt)
        ids = tuple(self.renderer.tokenize(self.answers.pop(0), add_special_tokens=False))
        choice = TokenChoice(0, "stop", None, ids, None, None)
        return TokenAnswer("id", "demo", 0, Usage(0, len(ids), len(ids), PromptTokensDetails(0)), "tokens", (choice,))


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    renderer = demo_renderer()
    yield renderer
    renderer.close()


@pytest.mark.parametrize("end", [END, ""], ids=["stopped", "cut off"])
async def test_three_turns_equal_the_conversation_rendered_at_once(renderer: Renderer, end: str) -> None:
    answers = ["The circle is red.", "No.", "Both are round."]
    turns = [about(picture(0))[0], {"role": "user", "content": "Is it blue?"}, about(picture(1), picture(0))[0]]
    client = Local(renderer, *(answer + end for answer in answers))
    rollout = await Rollout.start(client, turns[:1], cache_salt="mine")
    await rollout.answer()
    for turn in turns[1:]:
        await rollout.say(turn)
        await rollout.answer()
    conversation = [part for turn, answer in zip(turns, answers, strict=True) for part in (turn, reply(answer))]
    whole = await client.render_chat(conversation[:-1], cache_salt="mine")
    assert client.asked[-1].layout() == whole.layout()
    for ours, theirs in zip(rollout.prompt.items, whole.items, strict=True):
        assert ours.tensors is not None
        assert theirs.tensors is not None
        assert all(np.array_equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)
    own = [renderer.detokenize(rollout.prompt.token_ids[place]) for place in rollout.generated]
    assert own == [answer + end for answer in answers]


async def test_what_was_there_is_never_changed(renderer: Renderer) -> None:
    """The ids of an answer that the tokenizer would split otherwise stay as the model gave them."""
    client = Local(renderer)
    rollout = await Rollout.start(client, [{"role": "user", "content": "Hello"}])
    odd = tuple(id for letter in "The circle" for id in renderer.tokenize(letter, add_special_tokens=False))
    rollout.prompt = RenderedPrompt(rollout.prompt.token_ids + odd)
    before = rollout.prompt.token_ids
    await rollout.say({"role": "user", "content": "Go on"})
    assert rollout.prompt.token_ids[: len(before)] == before


async def test_a_template_that_does_not_append_is_refused() -> None:
    class Reversing(Local):
        async def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedPrompt:
            return RenderedPrompt(tuple(ord(sign) for message in reversed(messages) for sign in message["content"]))

    rollout = await Rollout.start(Reversing.__new__(Reversing), [{"role": "user", "content": "Hello"}])
    with pytest.raises(RequestError, match="does not append messages"):
        await rollout.say({"role": "user", "content": "Go on"})


def reply(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": answer}

"""A conversation as the engine sees it, turn by turn: what was tokenized or generated once stays as it is.

A chat client that sends messages has the model's own answers tokenized again, and may get other tokens than the model
chose. Here the next prompt is the last prompt's ids, the ids generated, and the new message's ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from deployments.answers.tokens import TokenAnswer
from renderer.errors import RequestError
from renderer.prompt import PromptItem, RenderedPrompt

Message = Mapping[str, Any]
_QUESTION: Message = {"role": "user", "content": "Hello."}
_ANSWERS = ("Yes.", "Not now")


class RolloutClient(Protocol):
    """What a rollout asks of a client."""

    async def render_chat(self, messages: Sequence[Message], **options: Any) -> RenderedPrompt: ...

    async def layout(self, messages: Sequence[Message], **options: Any) -> RenderedPrompt: ...

    async def generate(
        self, prompt: RenderedPrompt | Sequence[int], sampling: Mapping[str, Any] | None = None, **options: Any
    ) -> TokenAnswer: ...


class Rollout:
    """One conversation. `start` it, then `answer` and `say` in turns.

    Attributes:
        prompt: Everything so far: token ids, and the images with their tensors, as the engine gets them.
        generated: Where in the ids the model's own tokens are, a slice for each answer.
    """

    def __init__(self, client: RolloutClient, prompt: RenderedPrompt, frame: Sequence[int], closing: int) -> None:
        """
        Args:
            frame: Ids of a short conversation that ends with an answer, in whose place the real one is put.
            closing: How many of them end the answer.
        """
        self._client = client
        self._frame = tuple(frame)
        self._closing = self._frame[len(self._frame) - closing :]
        self.prompt = prompt
        self.generated: list[slice] = []

    @classmethod
    async def start(cls, client: RolloutClient, messages: Sequence[Message], **options: Any) -> Rollout:
        """Render the first prompt, and find out how the model's template ends an answer.

        Args:
            options: Fields of the chat body, as `cache_salt`.

        Raises:
            RequestError: The messages cannot be rendered.
        """
        prompt = await client.render_chat(messages, **options)
        frames = [await client.layout(_messages(answer), add_generation_prompt=False) for answer in _ANSWERS]
        first, second = (frame.token_ids for frame in frames)
        return cls(client, prompt, first, _common_end(first, second))

    async def answer(self, sampling: Mapping[str, Any] | None = None, **options: Any) -> TokenAnswer:
        """Generate, and take the ids of the answer's first choice into the prompt."""
        answer = await self._client.generate(self.prompt, sampling, **options)
        ids, start = tuple(answer.choices[0].token_ids), len(self.prompt.token_ids)
        self.prompt = replace(self.prompt, token_ids=self.prompt.token_ids + ids)
        self.generated.append(slice(start, start + len(ids)))
        return answer

    async def say(self, message: Message) -> None:
        """Append a message: of the prompt so far, nothing is rendered or tokenized again.

        Raises:
            RequestError: It cannot be rendered, or the model's template does not simply append messages.
        """
        framed = await self._client.render_chat([*_messages(_ANSWERS[0]), message])
        head = len(self._frame)
        if framed.token_ids[:head] != self._frame:
            raise RequestError("the chat template does not append messages, so none can be appended to ids")
        ids = self._closed()
        items = tuple(_moved(item, len(ids) - head) for item in framed.items)
        self.prompt = replace(self.prompt, token_ids=ids + framed.token_ids[head:], items=self.prompt.items + items)

    def _closed(self) -> tuple[int, ...]:
        """The ids so far with the model's answer ended as the template ends it: the model may have done that."""
        ids = self.prompt.token_ids
        for length in range(len(self._closing), 0, -1):
            if ids[-length:] == self._closing[:length]:
                return ids + self._closing[length:]
        return ids + self._closing


def _messages(answer: str) -> list[Message]:
    return [_QUESTION, {"role": "assistant", "content": answer}]


def _common_end(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common at their ends."""
    length = 0
    while length < min(len(first), len(second)) and first[-length - 1] == second[-length - 1]:
        length += 1
    return length


def _moved(item: PromptItem, by: int) -> PromptItem:
    return replace(item, range=replace(item.range, offset=item.range.offset + by))

"""A typed client of the application's handle, for Python programs on the same Ray cluster.

    client = Client()                                     # of the application named greenroom
    messages = [user("What colour is the shape?", png)]
    prompt = await client.render_chat(messages)           # tensors are read-only numpy arrays, not copied
    answer = await client.chat(messages, temperature=0)
    async for chunk in client.chat_stream(messages): ...

Errors are the classes of `renderer.errors`; where a router goes away under a call, it is an OverloadedError: ask again.
Options are the fields of the OpenAI bodies.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import orjson
import pybase64
from ray import serve
from ray.exceptions import RayActorError

from deployments.answers.openai import (
    ChatChunk,
    ChatCompletion,
    DetokenizeAnswer,
    ModelList,
    TextCompletion,
    TokenizeAnswer,
)
from deployments.answers.tokens import TokenAnswer, TokenChunk
from deployments.calls import ReplicaReport
from deployments.error_response import translate
from deployments.tier_handle import TierHandle, crosses_by_reference
from deployments.weights.control import PauseMode
from renderer.embed_runs import embed_runs
from renderer.prompt import PromptItem, RenderedPrompt

Messages = Sequence[Mapping[str, Any]]


class Client:
    """The operations of one application, awaited.

    Args:
        app_name: The application's name in Serve.
        handle: Its ingress handle, where the caller has it already.
    """

    def __init__(self, app_name: str = "greenroom", handle: Any = None) -> None:
        self._handle = _Ingress(serve.get_app_handle(app_name) if handle is None else handle)

    async def render_chat(self, messages: Messages, **options: Any) -> RenderedPrompt:
        """What an engine would get: token ids, and the images' ranges, hashes and tensors."""
        prompt: RenderedPrompt = await self._call("render_chat", {"messages": messages, **options}, tensors_back=True)
        return prompt

    async def render_completion(self, prompt: str | Sequence[Any], **options: Any) -> tuple[RenderedPrompt, ...]:
        """One rendered prompt for each prompt."""
        prompts: tuple[RenderedPrompt, ...] = await self._call("render_completion", {"prompt": prompt, **options})
        return prompts

    async def render_tokens(
        self, token_ids: Sequence[int], images: Sequence[bytes] = (), **options: Any
    ) -> RenderedPrompt:
        """The prompt of ids that hold one placeholder for each encoded image; nothing is tokenized."""
        parts = [{"type": "image_url", "url": data_url(data)} for data in images]
        body = {"token_ids": token_ids, "content_parts": parts, "sampling_params": {}, **options}
        prompt: RenderedPrompt = await self._call("render_tokens", body, tensors_back=True)
        return prompt

    async def layout(self, messages: Messages, **options: Any) -> RenderedPrompt:
        """Token ids, ranges and hashes; no pixel is decoded for it."""
        prompt: RenderedPrompt = await self._call("layout", {"messages": messages, **options})
        return prompt

    async def chat(self, messages: Messages, **options: Any) -> ChatCompletion:
        answer: ChatCompletion = await self._call("chat_completions", {"messages": messages, **options})
        return answer

    async def chat_stream(self, messages: Messages, **options: Any) -> AsyncGenerator[ChatChunk]:
        async with aclosing(self._stream("chat_completions_stream", {"messages": messages, **options})) as chunks:
            async for chunk in chunks:
                yield chunk

    async def completion(self, prompt: str | Sequence[Any], **options: Any) -> TextCompletion:
        answer: TextCompletion = await self._call("completions", {"prompt": prompt, **options})
        return answer

    async def generate(
        self, prompt: RenderedPrompt | Sequence[int], sampling: Mapping[str, Any] | None = None, **options: Any
    ) -> TokenAnswer:
        """Token ids in, token ids out: what `render_chat` gave, or ids alone.

        Args:
            sampling: The fields of `sampling_params`; without `max_tokens` the output may fill the context.
            options: Other fields of the body: `request_id`, `output_mode`, `content_parts`, ...
        """
        body, by_reference = _generate_body(prompt, sampling, options)
        answer: TokenAnswer = await self._handle.call("generate", body, by_reference=by_reference)
        return answer

    async def generate_stream(
        self, prompt: RenderedPrompt | Sequence[int], sampling: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncGenerator[TokenChunk]:
        """See `generate`."""
        body, by_reference = _generate_body(prompt, sampling, options)
        async with aclosing(self._handle.stream("generate_stream", body, by_reference)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def abort(self, *request_ids: str) -> None:
        """End generations by the ids that they were given, or that their answers show."""
        await self._call("abort", {"request_ids": request_ids})

    async def pause(self, mode: PauseMode = "wait") -> None:
        """Hold new generations back until `resume`, and wait until none runs; `abort` ends those that do."""
        await self._handle.call("pause", mode, by_reference=False)

    async def reload(self, path: str | None, version: str | None = None) -> str:
        """Have every engine replica take other weights while generation is paused; return their version.

        Args:
            path: A checkpoint of the same shape, which their nodes can read; None for the configuration's own.
        """
        taken: str = await self._handle.call("reload", path, version, by_reference=False)
        return taken

    async def resume(self) -> None:
        """Let generation go on."""
        await self._handle.call("resume", by_reference=False)

    async def tokenize(
        self, text: str | None = None, messages: Messages | None = None, **options: Any
    ) -> TokenizeAnswer:
        """Token ids of a text, or of messages with their images' placeholders expanded."""
        answer: TokenizeAnswer = await self._call("tokenize", {"prompt": text, "messages": messages, **options})
        return answer

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        answer: DetokenizeAnswer = await self._call("detokenize", {"tokens": token_ids})
        return answer.prompt

    async def models(self) -> ModelList:
        models: ModelList = await self._handle.call("models", by_reference=False)
        return models

    async def health(self) -> Mapping[str, tuple[ReplicaReport, ...]]:
        """The record of every running replica, by tier."""
        tiers: Mapping[str, tuple[ReplicaReport, ...]] = await self._handle.call("health", by_reference=False)
        return tiers

    async def _call(self, method: str, body: Mapping[str, Any], tensors_back: bool = False) -> Any:
        data = orjson.dumps(body)
        by_reference = crosses_by_reference(len(data), 8 * len(data), tensors_back)
        return await self._handle.call(method, data, by_reference=by_reference)

    def _stream(self, method: str, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
        data = orjson.dumps(body)
        return self._handle.stream(method, data, by_reference=crosses_by_reference(len(data), 0))


class _Ingress(TierHandle):
    """The handle of an application's routers, whose deaths are no error of Ray's to the caller."""

    async def call(self, method: str, *arguments: Any, by_reference: bool) -> Any:
        with _deaths_as_ours():
            return await super().call(method, *arguments, by_reference=by_reference)

    async def stream(self, method: str, argument: Any, by_reference: bool) -> AsyncGenerator[Any]:
        with _deaths_as_ours():
            async with aclosing(super().stream(method, argument, by_reference)) as items:
                async for item in items:
                    yield item


@contextmanager
def _deaths_as_ours() -> Iterator[None]:
    try:
        yield
    except RayActorError as error:
        raise translate(error) from error


def _generate_body(
    prompt: RenderedPrompt | Sequence[int], sampling: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The body of a generate request, tensors as arrays, and whether it should cross by reference."""
    prompt = prompt if isinstance(prompt, RenderedPrompt) else RenderedPrompt(tuple(prompt))
    body = {
        "token_ids": list(prompt.token_ids),
        "features": _features(prompt.items) if prompt.items else None,
        "cache_salt": prompt.cache_salt,
        "sampling_params": dict(sampling or {}),
    }
    size = 8 * len(prompt.token_ids) + sum(item.nbytes for item in prompt.items)
    return body | dict(options), crosses_by_reference(size, 0)


def _features(items: Sequence[PromptItem]) -> dict[str, Any]:
    return {
        "mm_hashes": {"image": [item.mm_hash for item in items]},
        "mm_placeholders": {"image": [{"offset": item.range.offset, "length": item.range.length} for item in items]},
        "mm_embed_runs": {"image": [embed_runs(item.range.embed_mask) for item in items]},
        "kwargs_data": {"image": [item.tensors for item in items]},
    }


def user(text: str, *images: bytes) -> dict[str, Any]:
    """A user's message: encoded images first, then the text."""
    return {"role": "user", "content": [*(image(data) for data in images), {"type": "text", "text": text}]}


def image(data: bytes, uuid: str | None = None) -> dict[str, Any]:
    """The part of a message that holds an encoded image (PNG, JPEG, ...).

    Args:
        uuid: The caller's own name for it, shown in the place of its hash.
    """
    return {"type": "image_url", "image_url": {"url": data_url(data)}, "uuid": uuid}


def data_url(data: bytes) -> str:
    """Encoded bytes as a URL."""
    return "data:;base64," + pybase64.b64encode_as_string(data)

"""What a handle's caller can do, and the HTTP routes that are the same operations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deployments.admission import Ticket
from deployments.answers.derender import DerenderAnswer
from deployments.answers.openai import (
    ChatChunk,
    ChatCompletion,
    DetokenizeAnswer,
    ModelList,
    TextCompletion,
    TokenizeAnswer,
)
from deployments.answers.tokens import TokenAnswer, TokenChunk
from deployments.bodies.strict import Data
from deployments.calls import ReplicaReport
from deployments.front import Front
from deployments.http.routes import http_app
from deployments.peers import Peers
from deployments.records import Record, application
from deployments.tier import Operation
from deployments.weights.control import PauseMode
from deployments.weights.training import Training
from deployments.weights.wanted import WeightsRecord
from renderer.prompt import RenderedPrompt

if TYPE_CHECKING:
    from fastapi import FastAPI


class Operations:
    """Base of the ingress deployments.

    Bodies are dicts in OpenAI's form (or pydantic objects, or JSON bytes); answers are the dataclasses of
    `deployments.answers.openai`, and rendered prompts with their tensors as read-only numpy arrays:

        handle = serve.get_app_handle("greenroom")
        prompt = await handle.render_chat.remote({"messages": [...]})
        async for chunk in handle.options(stream=True).chat_completions_stream.remote({"messages": [...]}): ...

    Errors are those of `renderer.errors`; by reference Ray wraps them in a class that is also theirs.
    """

    def __init__(self, front: Front, record: Record, peers: Peers | None = None) -> None:
        self.front = front
        self.record = record
        self.training = Training(front.backend.command, WeightsRecord(application(), front.config.model))
        self._peers = peers

    @contextmanager
    def taken(self, operation: Operation, body_bytes: int = 0) -> Iterator[Ticket]:
        """Around one request of an operation: it is recorded, and has a place among those under way.

        Raises:
            OverloadedError: There is no place.
        """
        name = "generate" if operation is Operation.GENERATE_FEATURES else str(operation)
        with self.record.request(name), self.front.admit(operation, body_bytes) as ticket:
            yield ticket

    async def chat_completions(self, body: Data) -> ChatCompletion:
        with self.taken(Operation.CHAT_COMPLETIONS) as ticket:
            return (await self.front.chat(await self.front.understand_chat(body, ticket))).value

    async def chat_completions_stream(self, body: Data) -> AsyncGenerator[ChatChunk]:
        """Chunks as they come; `stream` in the body has no part in it."""
        with self.taken(Operation.CHAT_COMPLETIONS) as ticket:
            reply = await self.front.chat_stream(await self.front.understand_chat(body, ticket))
            async for chunk in reply.value:
                yield chunk

    async def completions(self, body: Data) -> TextCompletion:
        with self.taken(Operation.COMPLETIONS) as ticket:
            return (await self.front.completion(await self.front.understand_completion(body, ticket))).value

    async def completions_stream(self, body: Data) -> AsyncGenerator[TextCompletion]:
        """See `chat_completions_stream`."""
        with self.taken(Operation.COMPLETIONS) as ticket:
            reply = await self.front.completion_stream(await self.front.understand_completion(body, ticket))
            async for chunk in reply.value:
                yield chunk

    async def generate(self, body: Data) -> TokenAnswer:
        """Token ids in, token ids out: `features` has processed items, `content_parts` raw ones."""
        with self.taken(Operation.GENERATE_FEATURES) as ticket:
            return (await self.front.generate(await self.front.understand_generate(body, ticket))).value

    async def generate_stream(self, body: Data) -> AsyncGenerator[TokenChunk]:
        """See `chat_completions_stream`."""
        with self.taken(Operation.GENERATE_FEATURES) as ticket:
            reply = await self.front.generate_stream(await self.front.understand_generate(body, ticket))
            async for chunk in reply.value:
                yield chunk

    async def abort(self, body: Data) -> None:
        """End the generations of `request_ids`, whoever asked for them."""
        await self.front.abort(body)

    async def pause(self, mode: PauseMode = "wait") -> None:
        """See `training.Training.pause`."""
        await self.training.pause(mode)

    async def reload(self, path: str | None, version: str | None = None) -> str:
        """See `training.Training.reload`."""
        return await self.training.reload(path, version)

    async def resume(self) -> None:
        """See `training.Training.resume`."""
        await self.training.resume()

    async def render_chat(self, body: Data) -> RenderedPrompt:
        """The prompt that an engine would get of a chat body, tensors included unless `mm_payload` is `none`."""
        with self.taken(Operation.RENDER_CHAT) as ticket:
            asked = await self.front.understand_chat(body, ticket)
            return (await self.front.render_one(Operation.RENDER_CHAT, asked)).value

    async def render_completion(self, body: Data) -> tuple[RenderedPrompt, ...]:
        """One prompt for each prompt of a completion body."""
        with self.taken(Operation.RENDER_COMPLETION) as ticket:
            return (await self.front.render_completion(await self.front.understand_completion(body, ticket))).value

    async def render_tokens(self, body: Data) -> RenderedPrompt:
        """The prompt of a generate body whose `token_ids` hold one placeholder for each of its `content_parts`."""
        with self.taken(Operation.RENDER_TOKENS) as ticket:
            asked = await self.front.understand_tokens(body, ticket)
            return (await self.front.render_one(Operation.RENDER_TOKENS, asked)).value

    async def layout(self, body: Data) -> RenderedPrompt:
        """The prompt of a chat body without tensors: tokens, ranges and hashes, and no pixel decoded."""
        with self.taken(Operation.LAYOUT) as ticket:
            return (await self.front.layout(await self.front.understand_chat(body, ticket))).value

    async def tokenize(self, body: Data) -> TokenizeAnswer:
        """Token ids of `prompt`, or of `messages` with their images' placeholders expanded."""
        with self.taken(Operation.TOKENIZE) as ticket:
            return (await self.front.tokenize(body, ticket)).value

    async def detokenize(self, body: Data) -> DetokenizeAnswer:
        """The text of `tokens`."""
        with self.taken(Operation.DETOKENIZE) as ticket:
            return (await self.front.detokenize(body, ticket)).value

    async def derender_chat(self, body: Data) -> DerenderAnswer:
        """The chat completion that an engine's `generate_response` is, or the chunk that its `generate_chunk` is."""
        with self.taken(Operation.DERENDER) as ticket:
            return (await self.front.derender(body, ticket, chat=True)).value

    async def derender_completion(self, body: Data) -> DerenderAnswer:
        """See `derender_chat`."""
        with self.taken(Operation.DERENDER) as ticket:
            return (await self.front.derender(body, ticket, chat=False)).value

    async def models(self) -> ModelList:
        """The names that requests may use."""
        return await self.front.models()

    async def health(self) -> Mapping[str, tuple[ReplicaReport, ...]]:
        """The record of every running replica, by tier; this ingress among them."""
        tiers, peers = await asyncio.gather(self.front.backend.reports(), self._own_tier())
        return {str(self.record.tier): peers, **tiers}

    async def clear_mm_cache(self) -> None:
        """Empty the media caches of all running replicas.

        Raises:
            IncompleteError: Some did not do it; says how many did.
        """
        await self.front.clear_mm_cache()

    async def _own_tier(self) -> tuple[ReplicaReport, ...]:
        return (await self.report(),) if self._peers is None else await self._peers.reports()

    async def report(self) -> ReplicaReport:
        """This replica's own record."""
        return self.record.report(under_way=self.front.under_way())

    async def check_health(self) -> None:
        """That it answers is the check."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the constructor is through."""
        return http_app(self)

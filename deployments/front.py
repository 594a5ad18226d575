"""The operations, written once: bodies in, answers out; where their work is done is the backend's."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from deployments.admission import Admission, Lane, Ticket
from deployments.affinity import affinity_key
from deployments.answers.completions import ChatForm, Head, TextForm, begun, whole
from deployments.answers.derender import DerenderAnswer, parse_derender
from deployments.answers.forms import AnswerForm
from deployments.answers.openai import (
    ChatChunk,
    ChatCompletion,
    DetokenizeAnswer,
    ModelCard,
    ModelList,
    TextCompletion,
    TokenizeAnswer,
)
from deployments.answers.pieces import Pieces
from deployments.answers.tokens import TokenAnswer, TokenChunk, TokenForm
from deployments.backends import Backend
from deployments.bodies.chat import ChatBody, RenderChatBody
from deployments.bodies.completion import CompletionBody
from deployments.bodies.generate import AbortBody, GenerateBody, RenderTokensBody
from deployments.bodies.generation import MAX_TOP_LOGPROBS, GenerationBody, StreamOptions
from deployments.bodies.strict import Data, parse
from deployments.bodies.tokenize import DetokenizeBody, TokenizeChatBody, parse_tokenize
from deployments.calls import (
    Choice,
    Envelope,
    Event,
    GenerateCall,
    Generation,
    RenderCall,
    Reply,
    SamplingRequest,
    TokenizeCall,
    expected_media_bytes,
)
from deployments.config import GreenroomConfig
from deployments.generation import merge
from deployments.metrics import metrics
from deployments.tier import GENERATION, Decision, Operation, Tier, Tiers, choose_tier
from renderer.conversation import ChatRequest, CompletionRequest, TokensRequest
from renderer.errors import ModelNotFoundError, RequestError, UnsupportedFieldError
from renderer.prompt import RenderedPrompt

T = TypeVar("T")
BodyT = TypeVar("BodyT", bound=RenderChatBody | CompletionBody | GenerateBody)
RequestT = TypeVar("RequestT", bound=Generation)

# Parsing more than this holds the event loop for longer than a thread costs.
INLINE_BYTES = 1024 * 1024
MAX_CHOICES = 128
MAX_REQUEST_ID_CHARS = 128
# An unary answer is sent in pieces too: what has arrived when a replica dies need not be generated again.
UNARY_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Understood(Generic[BodyT, RequestT]):
    """A body that has been parsed, and what it asks of a renderer and of an engine."""

    body: BodyT
    request: RequestT
    sampling: SamplingRequest
    request_id: str
    ticket: Ticket


ChatAsked = Understood[RenderChatBody, ChatRequest]
TextAsked = Understood[CompletionBody, CompletionRequest]
TokensAsked = Understood[GenerateBody, Generation]
TokensRenderAsked = Understood[RenderTokensBody, TokensRequest]


class Front:
    """One application's operations. `request_id` is the client's or Serve's id of a request, for ids and logs."""

    def __init__(self, config: GreenroomConfig, backend: Backend) -> None:
        self.config = config
        self.backend = backend
        self._tiers = Tiers(
            render=config.render is not None,
            engine=None if config.engine is None else config.engine.engine.backend,
        )
        self._admission = Admission({}, config.router.admission.retry_after_s)
        self._created = int(time.time())

    def admit(self, operation: Operation, body_bytes: int = 0) -> Ticket:
        """Take a place for a request. It counts by its body's bytes until it is understood, then by its media's.

        Raises:
            OverloadedError: There is none.
        """
        self._set_limits()
        if operation in GENERATION:
            return self._admission.admit(Lane.GENERATION, media_bytes=body_bytes)
        both = self.config.router.overflow and self._tiers.render and self._tiers.engine is not None
        lanes = (Lane.RENDER, Lane.OVERFLOW) if both else (Lane.RENDER,)
        if both and self.backend.running(Tier.RENDER) == 0:  # what waits for a tier of none is what makes it start
            lanes = (Lane.OVERFLOW, Lane.RENDER)
        ticket = self._admission.admit(*lanes, media_bytes=body_bytes)
        if ticket.lane is Lane.OVERFLOW:
            metrics().overflow.inc()
        return ticket

    def under_way(self) -> dict[str, float]:
        """Requests and bytes of media in each lane now."""
        levels: dict[str, float] = {}
        for lane in Lane:
            now = self._admission.under_way(lane)
            levels |= {f"{lane}_requests": now.requests, f"{lane}_media_bytes": now.media_bytes}
        return levels

    async def understand_chat(self, data: Data, ticket: Ticket, request_id: str | None = None) -> ChatAsked:
        """Parse a chat body, off the event loop where it is large.

        Raises:
            RequestError: It cannot be served as it is.
            OverloadedError: Its media do not fit beside those under way.
        """
        asked: ChatAsked = await self._understood(RenderChatBody, data, ticket, request_id)
        return asked

    async def understand_completion(self, data: Data, ticket: Ticket, request_id: str | None = None) -> TextAsked:
        """See `understand_chat`."""
        asked: TextAsked = await self._understood(CompletionBody, data, ticket, request_id)
        return asked

    async def chat(self, asked: ChatAsked) -> Reply[ChatCompletion]:
        return await whole(self._chat_events(asked, UNARY_TOKENS), self._chat_form(asked))

    async def chat_stream(self, asked: ChatAsked) -> Reply[AsyncGenerator[ChatChunk]]:
        """The chunks, once the first token is there."""
        usage = _usage_options(asked.body.stream_options)
        return await begun(self._chat_events(asked, 1), self._chat_form(asked), **usage)

    async def completion(self, asked: TextAsked) -> Reply[TextCompletion]:
        return await whole(self._text_events(asked, UNARY_TOKENS), self._text_form(asked))

    async def completion_stream(self, asked: TextAsked) -> Reply[AsyncGenerator[TextCompletion]]:
        """The chunks, once the first token is there."""
        usage = _usage_options(asked.body.stream_options)
        return await begun(self._text_events(asked, 1), self._text_form(asked), **usage)

    async def understand_generate(self, data: Data, ticket: Ticket, request_id: str | None = None) -> TokensAsked:
        """See `understand_chat`."""
        asked: TokensAsked = await self._understood(GenerateBody, data, ticket, request_id)
        return asked

    async def understand_tokens(self, data: Data, ticket: Ticket, request_id: str | None = None) -> TokensRenderAsked:
        """See `understand_chat`."""
        asked: TokensRenderAsked = await self._understood(RenderTokensBody, data, ticket, request_id)
        return asked

    async def generate(self, asked: TokensAsked) -> Reply[TokenAnswer]:
        return await whole(self._token_events(asked, UNARY_TOKENS), self._token_form(asked))

    async def generate_stream(self, asked: TokensAsked) -> Reply[AsyncGenerator[TokenChunk]]:
        """The chunks, once the first token is there."""
        usage = _usage_options(asked.body.stream_options)
        return await begun(self._token_events(asked, 1), self._token_form(asked), **usage)

    async def abort(self, data: Data) -> None:
        """End the requests of these ids; ids that are not under way are ignored."""
        await self.backend.abort(tuple(parse(AbortBody, data).request_ids))

    async def render_one(self, operation: Operation, asked: ChatAsked | TokensRenderAsked) -> Reply[RenderedPrompt]:
        """The rendered prompt of a chat or of token ids, with tensors unless the body says `mm_payload: none`."""
        decision, call = self._render_call(operation, asked, asked.body.tensors)
        reply = await self.backend.render(decision.tier, call)
        return Reply(reply.value[0], reply.served)

    async def layout(self, asked: ChatAsked) -> Reply[RenderedPrompt]:
        """The rendered prompt without tensors: no pixel is touched."""
        decision, call = self._render_call(Operation.LAYOUT, asked, tensors=False)
        reply = await self.backend.render(decision.tier, call)
        return Reply(reply.value[0], reply.served)

    async def render_completion(self, asked: TextAsked) -> Reply[tuple[RenderedPrompt, ...]]:
        """One rendered prompt for each prompt."""
        decision, call = self._render_call(Operation.RENDER_COMPLETION, asked)
        return await self.backend.render(decision.tier, call)

    async def render_one_answer(
        self, operation: Operation, asked: ChatAsked | TokensRenderAsked, form: AnswerForm = "json"
    ) -> Reply[Pieces]:
        """The HTTP answer, written where the tensors are made."""
        operation = operation if asked.body.tensors else Operation.LAYOUT
        decision, call = self._render_call(operation, asked, asked.body.tensors)
        return await self.backend.render_answer(decision.tier, dataclasses.replace(call, form=form))

    async def render_completion_answer(self, asked: TextAsked, form: AnswerForm = "json") -> Reply[Pieces]:
        """See `render_one_answer`."""
        decision, call = self._render_call(Operation.RENDER_COMPLETION, asked)
        return await self.backend.render_answer(decision.tier, dataclasses.replace(call, form=form))

    async def tokenize(self, data: Data, ticket: Ticket) -> Reply[TokenizeAnswer]:
        body = await _off_loop(data, lambda: parse_tokenize(data))
        self._check_model(body.model)
        request: str | ChatRequest = await _off_loop(data, body.request)
        ticket.resize(expected_media_bytes(request))
        special = isinstance(body, TokenizeChatBody) or body.add_special_tokens
        call = TokenizeCall(request, special, body.return_token_strs)
        reply = await self.backend.tokenize(self._choose(Operation.TOKENIZE, ticket).tier, call)
        ids = reply.value.token_ids
        length = min(reply.value.max_model_len, self.backend.max_model_len or reply.value.max_model_len)
        answer = TokenizeAnswer(len(ids), length, ids, reply.value.token_strs)
        return Reply(answer, reply.served)

    async def detokenize(self, data: Data, ticket: Ticket) -> Reply[DetokenizeAnswer]:
        body = await _off_loop(data, lambda: parse(DetokenizeBody, data))
        self._check_model(body.model)
        tier = self._choose(Operation.DETOKENIZE, ticket).tier
        reply = await self.backend.detokenize(tier, tuple(body.tokens))
        return Reply(DetokenizeAnswer(reply.value), reply.served)

    async def derender(self, data: Data, ticket: Ticket, chat: bool) -> Reply[DerenderAnswer]:
        """The OpenAI answer to what an engine generated, or its next chunk where the body says `stream`."""
        body = await _off_loop(data, lambda: parse_derender(data, chat))
        self._check_model(body.model)
        reply = await self.backend.derender(self._choose(Operation.DERENDER, ticket).tier, body.call())
        return Reply(body.answer(reply.value, self._model(body.model)), reply.served)

    async def models(self) -> ModelList:
        """The names that requests may use. `max_model_len` is what the replicas say, null while none has run."""
        if self.backend.max_model_len is None:
            await self.backend.reports()
        root, length = self.config.model, self.backend.max_model_len
        cards = (ModelCard(name, self._created, root, length) for name in self.config.served_model_names)
        return ModelList(tuple(cards))

    async def clear_mm_cache(self) -> None:
        """Empty the media caches of all running replicas.

        Raises:
            IncompleteError: Some did not do it; says how many did.
        """
        await self.backend.clear_mm_cache()

    async def _understood(
        self,
        kind: type[RenderChatBody | CompletionBody | GenerateBody],
        data: Data,
        ticket: Ticket,
        request_id: str | None,
    ) -> Understood[Any, Any]:
        def work() -> Understood[Any, Any]:
            body = parse(kind, data)
            self._check_model(body.model)
            return Understood(body, body.request(), body.sampling(), _request_id(request_id, body), ticket)

        asked = await _off_loop(data, work)
        ticket.resize(expected_media_bytes(asked.request))
        return asked

    def _choose(self, operation: Operation, ticket: Ticket) -> Decision:
        return choose_tier(operation, dataclasses.replace(self._tiers, render_full=ticket.lane is Lane.OVERFLOW))

    def _set_limits(self) -> None:
        """A lane's limit is this router's share of one replica's times those that run; a tier that is only starting is
        given work to wait."""
        limits, engines = self.config.router.admission, self.backend.running(Tier.ENGINE)
        renders = self.backend.running(Tier.RENDER) if self._tiers.render else engines
        whole = {
            Lane.RENDER: limits.render.limit(max(renders, 1)),
            Lane.GENERATION: limits.generation.limit(max(engines, 1)),
            Lane.OVERFLOW: limits.overflow.limit(engines),
        }
        share = self.backend.share()
        for lane, limit in whole.items():
            self._admission.set_limit(lane, limit.share(share))

    def _check_model(self, name: str | None) -> None:
        if name and name not in self.config.served_model_names:
            served = ", ".join(self.config.served_model_names)
            raise ModelNotFoundError(f"the model {name[:256]!r} is not served here; served: {served}", "model")

    def _model(self, name: str | None) -> str:
        return name or self.config.served_model_names[0]

    def _chat_form(self, asked: ChatAsked) -> ChatForm:
        return ChatForm(Head(f"chatcmpl-{asked.request_id}", self._model(asked.body.model)))

    def _text_form(self, asked: TextAsked) -> TextForm:
        return TextForm(Head(f"cmpl-{asked.request_id}", self._model(asked.body.model)))

    def _token_form(self, asked: TokensAsked) -> TokenForm:
        head = Head(f"generate-tokens-{asked.request_id}", self._model(asked.body.model))
        return TokenForm(head, asked.body.output_mode == "text", asked.body.return_token_ids)

    def _token_events(self, asked: TokensAsked, every: int) -> AsyncGenerator[Event]:
        parts = isinstance(asked.request, TokensRequest)
        operation = Operation.GENERATE_PARTS if parts else Operation.GENERATE_FEATURES
        return self._events(operation, asked, (asked.request,), every, asked.body.return_token_ids)

    def _chat_events(self, asked: ChatAsked, every: int) -> AsyncGenerator[Event]:
        _check_chat(asked.body)
        return self._events(Operation.CHAT_COMPLETIONS, asked, (asked.request,), every)

    def _text_events(self, asked: TextAsked, every: int) -> AsyncGenerator[Event]:
        prompts = tuple(dataclasses.replace(asked.request, prompts=(prompt,)) for prompt in asked.request.prompts)
        return self._events(Operation.COMPLETIONS, asked, prompts, every)

    def _events(
        self,
        operation: Operation,
        asked: Understood[Any, Any],
        prompts: tuple[Generation, ...],
        every: int,
        return_prompt: bool = False,
    ) -> AsyncGenerator[Event]:
        """The events of all prompts' choices, numbered prompt by prompt."""
        _check_followed(asked.sampling)
        skip = choose_tier(operation, self._tiers).skip_mm_cache or False
        n, logprobs = asked.sampling.n, asked.sampling.logprobs or 0
        if logprobs > MAX_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs: at most {MAX_TOP_LOGPROBS}, got {logprobs}", "top_logprobs")
        if n * len(prompts) > MAX_CHOICES:
            raise RequestError(f"n: at most {MAX_CHOICES} choices a request, got {n * len(prompts)}", "n")
        calls = [
            GenerateCall(
                request=prompt,
                sampling=asked.sampling,
                choices=tuple(Choice(place * n + number) for number in range(n)),
                request_id=uuid.uuid4().hex,
                skip_mm_cache=skip,
                every=every,
                affinity=affinity_key(prompt),
                client_id=asked.request_id,
                return_prompt=return_prompt,
            )
            for place, prompt in enumerate(prompts)
        ]
        return merge([self.backend.generate(call) for call in calls])

    def _render_call(
        self, operation: Operation, asked: Understood[Any, Any], tensors: bool = True
    ) -> tuple[Decision, RenderCall]:
        decision = self._choose(operation, asked.ticket)
        body = asked.body
        options = None if body.stream_options is None else body.stream_options.model_dump()
        ended = isinstance(body, ChatBody) and not body.include_reasoning
        offsets = isinstance(body, GenerationBody) and body.return_token_offsets
        envelope = Envelope(asked.request_id, body.model, body.stream, options, body.priority, ended or None, offsets)
        skip = decision.skip_mm_cache or False
        tensors = tensors and decision.pixels
        longest = self.backend.max_model_len
        call = RenderCall(asked.request, asked.sampling, envelope, skip, tensors, max_model_len=longest)
        return decision, call


def _check_followed(sampling: SamplingRequest) -> None:
    """Refuse what a render-only answer passes on and no engine here follows."""
    for name in sampling.unfollowed:
        raise UnsupportedFieldError(f"{name} is not supported by this engine; render answers pass it on", name)


def _check_chat(body: ChatBody) -> None:
    """Refuse what a generated answer would have to follow and this engine's does not."""
    if body.tools and body.tool_choice != "none":
        raise UnsupportedFieldError(
            "tools are rendered, but their calls are not parsed; set tool_choice to none", "tools"
        )


def _usage_options(options: StreamOptions | None) -> dict[str, bool]:
    if options is None:
        return {}
    return {"include_usage": options.include_usage, "continuous_usage": options.continuous_usage_stats}


def _request_id(given: str | None, body: ChatBody | CompletionBody | GenerateBody) -> str:
    """The body's own id first: Serve gives every request one, so a header says nothing of the client's wish."""
    return (body.request_id or given or uuid.uuid4().hex)[:MAX_REQUEST_ID_CHARS]


async def _off_loop(data: Data, work: Callable[[], T]) -> T:
    """The result of `work` on a body: in a thread where that is large, or of unknown size."""
    if isinstance(data, bytes) and len(data) <= INLINE_BYTES:
        return work()
    return await asyncio.to_thread(work)

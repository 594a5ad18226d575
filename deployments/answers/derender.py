"""Engines' answers in token ids become OpenAI answers: bodies in, what a renderer is asked, its texts in their form.

A stream is derendered chunk by chunk and without memory: what the next chunk needs goes to the client as plain JSON and
comes back with it. It is a few tokens, however long the output.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.answers.openai import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    ChunkChoice,
    TextChoice,
    TextCompletion,
    Usage,
    chat_logprobs,
    text_logprobs,
    usage,
)
from deployments.bodies.strict import Body, Data, TokenId, loaded, parse
from deployments.calls import DerenderCall, Derendered, OutputTokens
from engine.protocol import TokenLogprobs
from renderer.detokenizer import CONTEXT_TOKENS, MAX_PENDING_TOKENS, DetokenizerState
from renderer.errors import RequestError

MAX_CHOICES = 16384
MAX_STATE_TOKENS = max(CONTEXT_TOKENS, MAX_PENDING_TOKENS)
StateTokens = Annotated[list[TokenId], Field(max_length=MAX_STATE_TOKENS)]


class _Foreign(BaseModel):
    """What an engine wrote: fields that no answer needs are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TokenLogprobBody(_Foreign):
    token_id: TokenId
    logprob: float
    rank: int = 0


class SampledLogprobBody(TokenLogprobBody):
    top_logprobs: list[TokenLogprobBody] = Field(default_factory=list)

    def entry(self) -> TokenLogprobs:
        top = tuple((each.token_id, each.logprob) for each in self.top_logprobs)
        return TokenLogprobs(self.token_id, self.logprob, self.rank, top)


class LogprobsBody(_Foreign):
    content: list[SampledLogprobBody] = Field(default_factory=list)


class OutputBody(_Foreign):
    """One choice of an engine's answer, or what a chunk adds to it."""

    index: int = Field(ge=0, lt=MAX_CHOICES)
    token_ids: list[TokenId]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: LogprobsBody | None = None

    def output(self, prompt_tail: Sequence[int], state: DetokenizerState | None = None) -> OutputTokens:
        return OutputTokens(
            token_ids=tuple(self.token_ids),
            prompt_tail=tuple(prompt_tail[-CONTEXT_TOKENS:]),
            logprobs=() if self.logprobs is None else tuple(each.entry() for each in self.logprobs.content),
            finished=self.finish_reason is not None,
            state=state,
        )

    def chat(self, text: Derendered, with_ids: bool) -> ChatChoice:
        logprobs, finish = chat_logprobs(text.logprobs), self.finish_reason or "stop"
        ids = tuple(self.token_ids) if with_ids else None
        return ChatChoice(self.index, ChatMessage(text.text), logprobs, finish, self.stop_reason, ids)

    def chat_chunk(self, text: Derendered, first: bool) -> ChunkChoice:
        content = {"content": text.text} if text.text or first else {}
        delta = {"role": "assistant", **content} if first else content
        return ChunkChoice(self.index, delta, chat_logprobs(text.logprobs), self.finish_reason, self.stop_reason)

    def text(self, text: Derendered, index: int, offset: int = 0) -> TextChoice:
        """
        Args:
            offset: Characters of the choice's text before these.
        """
        logprobs = text_logprobs(text.logprobs, offset)
        return TextChoice(index, text.text, logprobs, self.finish_reason, self.stop_reason)


class UsageBody(_Foreign):
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)


class ChunkBody(_Foreign):
    """One chunk of an engine's streamed answer."""

    request_id: str
    choices: list[OutputBody] = Field(max_length=1)
    usage: UsageBody | None = None
    prompt_token_ids: list[TokenId] | None = None
    output_mode: Literal["tokens"] = "tokens"


class AnswerBody(_Foreign):
    """An engine's whole answer."""

    request_id: str
    choices: list[OutputBody] = Field(min_length=1, max_length=MAX_CHOICES)
    usage: UsageBody | None = None
    prompt_token_ids: list[TokenId] | None = None
    prompt_logprobs: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    output_mode: Literal["tokens"] = "tokens"

    @model_validator(mode="after")
    def _choices_have_tokens(self) -> Self:
        if not all(choice.token_ids for choice in self.choices):
            raise RequestError("a choice of generate_response has no token_ids", "generate_response")
        return self

    def prompt_tokens(self, told: int | None) -> int:
        return told if told is not None else self.usage.prompt_tokens if self.usage else 0


class OriginalBody(_Foreign):
    """What of the original request shapes the text; the rest of it has been followed by then."""

    skip_special_tokens: bool = True
    return_token_ids: bool = False


class StateBody(BaseModel):
    """What a client keeps between two chunks of a choice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: StateTokens
    pending: StateTokens = Field(default_factory=list)
    begun: bool = False
    offset: int = Field(0, ge=0, description="Characters of the text so far.")

    @property
    def tokens(self) -> DetokenizerState:
        return DetokenizerState(tuple(self.context), tuple(self.pending))


@dataclass(frozen=True, slots=True)
class StreamState:
    """`StateBody`, on its way out."""

    context: tuple[int, ...]
    pending: tuple[int, ...]
    begun: bool
    offset: int


@dataclass(frozen=True, slots=True)
class ChunkAnswer:
    """A chunk of the OpenAI stream, and what the next call must bring."""

    chunk: ChatChunk | TextCompletion
    stream_state: StreamState | Mapping[str, Any] | None


class _Whole(Body):
    """What bodies of whole answers have in common: how to ask for their texts."""

    def _call(
        self, answers: Sequence[AnswerBody], tails: Sequence[Sequence[int] | None], original: OriginalBody
    ) -> DerenderCall:
        outputs = tuple(
            choice.output(tail or answer.prompt_token_ids or ())
            for answer, tail in zip(answers, tails, strict=True)
            for choice in answer.choices
        )
        if len(outputs) > MAX_CHOICES:
            raise RequestError(f"at most {MAX_CHOICES} choices, there are {len(outputs)}", "generate_responses")
        return DerenderCall(outputs, original.skip_special_tokens)


class DerenderChatBody(_Whole):
    """`POST /v1/chat/completions/derender` of a whole answer."""

    generate_response: AnswerBody
    prompt_tokens: int | None = Field(None, ge=0)
    prompt_token_ids: list[TokenId] | None = None
    chat_request: OriginalBody = OriginalBody()
    stream: Literal[False] = False

    def call(self) -> DerenderCall:
        return self._call([self.generate_response], [self.prompt_token_ids], self.chat_request)

    def answer(self, texts: Sequence[Derendered], model: str) -> ChatCompletion:
        given, with_ids = self.generate_response, self.chat_request.return_token_ids
        pairs = zip(given.choices, texts, strict=True)
        return ChatCompletion(
            id=given.request_id,
            created=int(time.time()),
            model=model,
            choices=tuple(choice.chat(text, with_ids) for choice, text in pairs),
            usage=_usage(given.prompt_tokens(self.prompt_tokens), given.choices),
            prompt_logprobs=given.prompt_logprobs,
            kv_transfer_params=given.kv_transfer_params,
        )


class DerenderTextBody(_Whole):
    """`POST /v1/completions/derender` of whole answers, one for each prompt."""

    generate_responses: list[AnswerBody] = Field(min_length=1)
    prompt_tokens: list[Annotated[int, Field(ge=0)]] | None = None
    prompt_token_ids: list[list[TokenId] | None] | None = None
    completion_request: OriginalBody = OriginalBody()
    stream: Literal[False] = False

    @model_validator(mode="after")
    def _one_of_each_for_each_answer(self) -> Self:
        for name in ("prompt_tokens", "prompt_token_ids"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.generate_responses):
                raise RequestError(f"{name} needs one entry for each of generate_responses", name)
        return self

    def call(self) -> DerenderCall:
        tails = self.prompt_token_ids or [None] * len(self.generate_responses)
        return self._call(self.generate_responses, tails, self.completion_request)

    def answer(self, texts: Sequence[Derendered], model: str) -> TextCompletion:
        answers = self.generate_responses
        choices = [choice for answer in answers for choice in answer.choices]
        pairs = enumerate(zip(choices, texts, strict=True))
        told: Sequence[int | None] = self.prompt_tokens or [None] * len(answers)
        prompts = sum(answer.prompt_tokens(own) for answer, own in zip(answers, told, strict=True))
        return TextCompletion(
            id=answers[0].request_id,
            created=int(time.time()),
            model=model,
            choices=tuple(choice.text(text, place) for place, (choice, text) in pairs),
            usage=_usage(prompts, choices),
        )


class _Stream(Body):
    """What bodies of chunks have in common."""

    generate_chunk: ChunkBody
    stream: Literal[True]
    stream_state: StateBody | None = None
    prompt_tokens: int | None = Field(None, ge=0)
    prompt_token_ids: list[TokenId] | None = None

    def _call(self, original: OriginalBody) -> DerenderCall:
        tail = self.prompt_token_ids or self.generate_chunk.prompt_token_ids or ()
        state = None if self.stream_state is None else self.stream_state.tokens
        outputs = tuple(choice.output(tail, state) for choice in self.generate_chunk.choices)
        return DerenderCall(outputs, original.skip_special_tokens, stream=True)

    def _state(self, texts: Sequence[Derendered]) -> StreamState | Mapping[str, Any] | None:
        """Where the stream is after this chunk."""
        if not texts:
            return None if self.stream_state is None else self.stream_state.model_dump()
        (text,) = texts
        tokens = text.state or DetokenizerState(())
        return StreamState(tokens.context, tokens.pending, True, self._offset + len(text.text))

    @property
    def _first(self) -> bool:
        return self.stream_state is None or not self.stream_state.begun

    @property
    def _offset(self) -> int:
        return 0 if self.stream_state is None else self.stream_state.offset

    def _usage(self) -> Usage | None:
        given = self.generate_chunk.usage
        if given is None:
            return None
        prompt_tokens = given.prompt_tokens if self.prompt_tokens is None else self.prompt_tokens
        return usage(prompt_tokens, given.completion_tokens)


class DerenderChatChunkBody(_Stream):
    """`POST /v1/chat/completions/derender` of one chunk."""

    chat_request: OriginalBody = OriginalBody()

    def call(self) -> DerenderCall:
        return self._call(self.chat_request)

    def answer(self, texts: Sequence[Derendered], model: str) -> ChunkAnswer:
        given = self.generate_chunk
        choices = tuple(choice.chat_chunk(text, self._first) for choice, text in zip(given.choices, texts, strict=True))
        chunk = ChatChunk(given.request_id, int(time.time()), model, choices, self._usage())
        return ChunkAnswer(chunk, self._state(texts))


class DerenderTextChunkBody(_Stream):
    """`POST /v1/completions/derender` of one chunk."""

    completion_request: OriginalBody = OriginalBody()

    def call(self) -> DerenderCall:
        return self._call(self.completion_request)

    def answer(self, texts: Sequence[Derendered], model: str) -> ChunkAnswer:
        given = self.generate_chunk
        choices = tuple(
            choice.text(text, choice.index, self._offset) for choice, text in zip(given.choices, texts, strict=True)
        )
        chunk = TextCompletion(given.request_id, int(time.time()), model, choices, self._usage())
        return ChunkAnswer(chunk, self._state(texts))


DerenderAnswer = ChatCompletion | TextCompletion | ChunkAnswer
DerenderBody = DerenderChatBody | DerenderTextBody | DerenderChatChunkBody | DerenderTextChunkBody


def parse_derender(data: Data, chat: bool) -> DerenderBody:
    """The body of either route, whole or of one chunk.

    Raises:
        SchemaError, UnsupportedFieldError, RequestError: See `schemas.parse`.
    """
    given = loaded(data)
    streamed = isinstance(given, Mapping) and given.get("stream") is True
    if chat:
        return parse(DerenderChatChunkBody, given) if streamed else parse(DerenderChatBody, given)
    return parse(DerenderTextChunkBody, given) if streamed else parse(DerenderTextBody, given)


def _usage(prompt_tokens: int, choices: Sequence[OutputBody]) -> Usage:
    return usage(prompt_tokens, sum(len(choice.token_ids) for choice in choices))

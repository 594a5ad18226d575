"""Request bodies. Strict: a field that would change the answer and is not supported, or is unknown, is refused by name;
one that cannot change it is accepted. A null is the same as leaving a field out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.calls import SamplingRequest
from deployments.messages import MessageBody, conversation
from deployments.sampling import check
from renderer.conversation import ChatRequest, CompletionRequest
from renderer.errors import RequestError, SchemaError, UnsupportedFieldError

BodyT = TypeVar("BodyT", bound="Body")
Data = bytes | Mapping[str, Any] | BaseModel
TokenId = Annotated[int, Field(ge=0)]
MAX_ERRORS = 10
MAX_TOP_LOGPROBS = 20

# Accounting, routing hints and the like: no answer depends on them.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "session_id",
    }
)
# What would change an answer and is not supported, with the values that mean "as if it were not there".
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "ec_transfer_params": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logit_bias": ({},),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}


class Strict(BaseModel):
    """An object of which every field is understood, ignored on purpose, or refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ignored: ClassVar[frozenset[str]] = IGNORED
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_understood(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {}
        for name, value in data.items():
            if value is None or name in cls.ignored:
                continue
            if name in cls.model_fields:
                known[name] = value
            elif name not in cls.unsupported:
                raise UnsupportedFieldError(f"unknown field {str(name)[:128]!r}", str(name)[:128])
            elif value not in cls.unsupported[name]:
                raise UnsupportedFieldError(f"{name} is not supported", name)
        return known


class Body(Strict):
    """Root of all bodies."""

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @property
    def asks(self) -> bool:
        return self.include_usage or self.continuous_usage_stats


class JsonSchema(BaseModel):
    """`strict` and the names have no meaning here: a schema is always followed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    value: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What the output must look like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structured(self) -> dict[str, Any] | None:
        """A JSON schema, `{}` for any object, None for free text.

        Raises:
            SchemaError: `json_schema` is asked for and missing.
        """
        if self.type == "json_object":
            return {}
        if self.type == "text":
            return None
        if self.json_schema is None:
            raise SchemaError("response_format needs json_schema", "body.response_format.json_schema")
        return self.json_schema.value


class _Generation(Body):
    """What chat and completion bodies have in common."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int = 1
    stop: str | Annotated[list[str], Field(max_length=4)] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: str | None = None
    priority: int = 0
    request_id: str | None = None

    @model_validator(mode="after")
    def _stream_options_belong_to_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream", "stream_options")
        return self

    def _sampling(self, max_tokens: int | None, logprobs: int | None, max_tokens_field: str) -> SamplingRequest:
        sampling = SamplingRequest(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            structured=None if self.response_format is None else self.response_format.structured(),
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            n=self.n,
            max_tokens_field=max_tokens_field,
        )
        check(sampling)
        return sampling


class ToolBody(BaseModel):
    """A function that the model may call; templates read what they know of it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    function: dict[str, Any]


class ToolName(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["function"] = "function"
    function: ToolName


class _Conversation(Body):
    """What shapes the tokens of a conversation."""

    messages: list[MessageBody]
    tools: list[ToolBody] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    mm_processor_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _null_is_no_conversation(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "messages" in data and data["messages"] is None:
            raise RequestError("messages must not be null", "messages")
        return data

    @model_validator(mode="after")
    def _a_conversation_has_messages(self) -> Self:
        if not self.messages:
            raise RequestError("messages must not be empty", "messages")
        return self

    def request(self) -> ChatRequest:
        """The conversation for the renderer; takes the images out of their data URLs, which is slow for large ones."""
        return ChatRequest(
            messages=conversation(self.messages),
            tools=None if self.tools is None else tuple(tool.model_dump(exclude_unset=True) for tool in self.tools),
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            add_special_tokens=self.add_special_tokens,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            mm_processor_kwargs=self.mm_processor_kwargs,
        )


class ChatBody(_Generation, _Conversation):
    """`POST /v1/chat/completions`."""

    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _top_logprobs_belong_to_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs", "top_logprobs")
        return self

    @model_validator(mode="after")
    def _no_tool_has_to_be_called(self) -> Self:
        if self.tool_choice is not None and self.tools is None and self.tool_choice != "none":
            raise RequestError("tool_choice needs tools", "tool_choice")
        if self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool):
            raise UnsupportedFieldError("tool_choice: auto and none are supported", "tool_choice")
        return self

    def request(self) -> ChatRequest:
        return dataclasses.replace(
            super().request(),
            documents=None if self.documents is None else tuple(self.documents),
            chat_template_kwargs=self._template_kwargs(),
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            cache_salt=self.cache_salt,
        )

    def _template_kwargs(self) -> Mapping[str, Any]:
        """Templates know the effort by its name, or only whether the model is to think at all."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        thinks = {"enable_thinking": self.reasoning_effort != "none"}
        return {**thinks, **self.chat_template_kwargs, "reasoning_effort": self.reasoning_effort}

    def sampling(self) -> SamplingRequest:
        newer = self.max_completion_tokens is not None
        return self._sampling(
            self.max_completion_tokens if newer else self.max_tokens,
            self.top_logprobs if self.logprobs else None,
            "max_completion_tokens" if newer else "max_tokens",
        )


class Payload(Body):
    """Whether an answer carries tensors. `return_mm_kwargs: false` is an old spelling of `none`."""

    mm_payload: Literal["tensors", "none"] = "tensors"
    return_mm_kwargs: bool = True

    @property
    def tensors(self) -> bool:
        return self.mm_payload == "tensors" and self.return_mm_kwargs


class RenderChatBody(ChatBody, Payload):
    """`POST /v1/chat/completions/render`: a chat body, and what its answer carries."""


class CompletionBody(_Generation):
    """`POST /v1/completions` and `POST /v1/completions/render`."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]] = ""
    logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True
    max_prompts: ClassVar[int] = 1024
    default_max_tokens: ClassVar[int] = 16

    def sampling(self) -> SamplingRequest:
        limit = self.default_max_tokens if self.max_tokens is None else self.max_tokens
        return self._sampling(limit, self.logprobs, "max_tokens")

    def request(self) -> CompletionRequest:
        return CompletionRequest(
            prompts=self._prompts(),
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            cache_salt=self.cache_salt,
        )

    def _prompts(self) -> tuple[str | tuple[int, ...], ...]:
        if isinstance(self.prompt, str):
            prompts: tuple[str | tuple[int, ...], ...] = (self.prompt,)
        elif self.prompt and isinstance(self.prompt[0], int):
            prompts = (tuple(token for token in self.prompt if isinstance(token, int)),)
        else:
            prompts = tuple(_frozen(prompt) for prompt in self.prompt)
        if not prompts or not all(prompts):
            raise RequestError("prompt must not be empty", "prompt")
        if len(prompts) > self.max_prompts:
            raise RequestError(f"prompt: at most {self.max_prompts} prompts, got {len(prompts)}", "prompt")
        return prompts


class TokenizeTextBody(Body):
    """`POST /tokenize` of a text."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False

    def request(self) -> str:
        return self.prompt


class TokenizeChatBody(_Conversation):
    """`POST /tokenize` of a conversation, which wins over a text beside it."""

    ignored: ClassVar[frozenset[str]] = IGNORED | {"prompt"}

    return_token_strs: bool = False


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    tokens: list[Annotated[int, Field(ge=0, le=2**63 - 1)]]


def parse(kind: type[BodyT], data: Data) -> BodyT:
    """A body out of its JSON, or out of what a handle's caller gave: a dict or a pydantic object of the same fields.

    Raises:
        SchemaError: It is not JSON, or not of this form; names the first field at fault.
        UnsupportedFieldError: Names the field.
    """
    if isinstance(data, kind):
        return data
    try:
        return kind.model_validate(loaded(data))
    except ValidationError as error:
        raise _schema_error(error) from error


def parse_tokenize(data: Data) -> TokenizeTextBody | TokenizeChatBody:
    """See `parse`."""
    given = loaded(data)
    if isinstance(given, Mapping) and given.get("messages") is not None:
        return parse(TokenizeChatBody, given)
    return parse(TokenizeTextBody, given)


def loaded(data: Data) -> Any:
    """What a body's bytes spell, or a body that a handle's caller gave, as plain objects.

    Raises:
        SchemaError: It is not JSON.
    """
    if isinstance(data, BaseModel):
        return data.model_dump(exclude_none=True)
    try:
        return orjson.loads(data) if isinstance(data, bytes) else data
    except orjson.JSONDecodeError as error:
        raise SchemaError(f"the body is not JSON: {error.msg} at character {error.pos}", f"body.{error.pos}") from error


def _schema_error(error: ValidationError) -> SchemaError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [f"{_path(entry['loc'])}: {entry['msg']}" for entry in found[:MAX_ERRORS]]
    if len(found) > MAX_ERRORS:
        lines.append(f"...and {len(found) - MAX_ERRORS} more")
    return SchemaError("; ".join(lines), _path(found[0]["loc"]))


def _path(place: tuple[int | str, ...]) -> str:
    """Dotted, without the names of types that pydantic puts in where a field takes several."""
    named = (
        str(part) for part in place if isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))
    )
    return ".".join(("body", *named))


def _frozen(prompt: str | int | list[int]) -> str | tuple[int, ...]:
    return tuple(prompt) if isinstance(prompt, list) else str(prompt)

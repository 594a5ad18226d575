"""What bodies say about a generation: sampling fields, streams, the form of the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.bodies.engine_fields import EngineFields
from deployments.bodies.strict import Body, TokenId
from deployments.calls import SamplingRequest
from deployments.sampling import check
from renderer.errors import RequestError, SchemaError, UnsupportedFieldError

MAX_TOP_LOGPROBS = 20
# Fields that pass as they are.
_AS_GIVEN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "n",
)


class SamplingFields(Protocol):
    """What every body with sampling fields has, beside those that pass as they are."""

    @property
    def stop(self) -> str | list[str]: ...
    @property
    def stop_token_ids(self) -> list[int]: ...
    def passed_on(self) -> dict[str, Any]: ...
    def unfollowed(self) -> tuple[str, ...]: ...


def sampling_of(body: SamplingFields, **others: Any) -> SamplingRequest:
    """The sampling fields of a body, with others that each kind of body spells in its own way.

    Raises:
        RequestError: A value that no model could be asked for; names the field.
    """
    sampling = SamplingRequest(
        **{name: getattr(body, name) for name in _AS_GIVEN},
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        passed_on=body.passed_on(),
        unfollowed=body.unfollowed(),
        **others,
    )
    check(sampling)
    return sampling


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


class GenerationBody(Body, EngineFields):
    """What chat and completion bodies have in common."""

    only_generated: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "vllm_xargs": ({},),
        "kv_transfer_params": ({},),
        "ec_transfer_params": ({},),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "return_token_offsets": (False,),
    }

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
    vllm_xargs: dict[str, Any] = Field(default_factory=dict)
    kv_transfer_params: dict[str, Any] = Field(default_factory=dict)
    ec_transfer_params: dict[str, Any] = Field(default_factory=dict)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_token_offsets: bool = False

    @model_validator(mode="after")
    def _stream_options_belong_to_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream", "stream_options")
        return self

    @model_validator(mode="after")
    def _logprobs_of_prompts_are_not_streamed(self) -> Self:
        if self.stream and self.prompt_logprobs:
            raise RequestError("prompt_logprobs are not streamed", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _logprobs_of_tokens_belong_to_logprobs(self) -> Self:
        if self.logprob_token_ids and self.likeliest is None:
            raise RequestError("logprob_token_ids needs logprobs", "logprob_token_ids")
        return self

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are asked for beside each sampled one; None where no logprobs are."""
        raise NotImplementedError

    @property
    def likeliest_to_report(self) -> int | None:
        """The same of an engine: tokens that are named take the place of the likeliest."""
        return None if self.logprob_token_ids else self.likeliest

    def structured(self) -> dict[str, Any] | None:
        """The JSON schema that an engine here is told, `{}` for any JSON object, None for none.

        Raises:
            RequestError: Two fields ask for a form of the text, or one asks wrongly.
        """
        told = None if self.response_format is None else self.response_format.structured()
        if self.structured_outputs is None:
            return told
        if told is not None:
            raise RequestError("structured_outputs and response_format exclude each other", "structured_outputs")
        return self.structured_outputs.schema_of_json() if self.structured_outputs.followed() else None

    def passed_on(self) -> dict[str, Any]:
        """See `EngineFields.passed_on`. Tokens of a connector's own, in the place of the rendered ones, are refused."""
        if self.kv_transfer_params.get("prompt_token_ids") is not None:
            raise UnsupportedFieldError(
                "kv_transfer_params.prompt_token_ids is not supported", "kv_transfer_params.prompt_token_ids"
            )
        connectors = {"kv_transfer_params": self.kv_transfer_params, "ec_transfer_params": self.ec_transfer_params}
        extra = {**self.vllm_xargs, **{name: given for name, given in connectors.items() if given}}
        return {**super().passed_on(), **({"extra_args": extra} if extra else {})}

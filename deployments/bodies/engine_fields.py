"""Sampling fields of the wire protocol that no engine of this program follows: the answer to a render-only request
passes them on to whoever generates from it, a generation here refuses them by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.bodies.strict import Strict, TokenId, check_depth
from renderer.errors import RequestError

MAX_BIAS = 100.0
_EMPTY: tuple[Any, ...] = (None, [], {})


class StructuredOutputs(BaseModel):
    """What the text must be: one of the first six. `json` and `json_object` are followed here, the others passed on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What has no meaning for an engine here, as the library that follows a schema is always the same.
    any_way: ClassVar[frozenset[str]] = frozenset({"disable_any_whitespace", "disable_fallback"})

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    disable_fallback: bool = False

    @model_validator(mode="before")
    @classmethod
    def _what_vllm_keeps_for_itself_is_passed_over(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {name: value for name, value in data.items() if not str(name).startswith("_")}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = (self.json_, self.regex, self.choice, self.grammar, self.structural_tag, self.json_object or None)
        if sum(kind is not None for kind in kinds) > 1:
            raise RequestError("structured_outputs takes one kind of constraint", "structured_outputs")
        return self

    def given(self) -> dict[str, Any]:
        """What is asked for, by the protocol's names."""
        asked = self.model_dump(by_alias=True, exclude_none=True)
        return {name: value for name, value in asked.items() if value is not False}

    def followed(self) -> bool:
        """Whether an engine here can be told all of it."""
        return self.given().keys() <= {"json", "json_object"} | self.any_way

    def schema_of_json(self) -> dict[str, Any] | None:
        """A schema, `{}` for any JSON object, None where no JSON is asked for.

        Raises:
            RequestError: It is no JSON schema.
        """
        schema: Any = self.json_
        if isinstance(schema, str):
            try:
                schema = orjson.loads(schema)
            except orjson.JSONDecodeError as error:
                raise RequestError(f"structured_outputs.json is not JSON: {error.msg}", "structured_outputs") from error
            check_depth(schema, "structured_outputs")
        if schema is not None and not isinstance(schema, dict):
            raise RequestError("structured_outputs.json must be a JSON schema", "structured_outputs")
        return {} if self.json_object else schema


class RepetitionDetection(BaseModel):
    """Ends an output that repeats itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_pattern_size: int = Field(0, ge=0)
    min_pattern_size: int = Field(0, ge=0)
    min_count: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _a_pattern_repeats(self) -> Self:
        sized = self.min_pattern_size <= self.max_pattern_size
        if not sized or (self.max_pattern_size and self.min_count < 2):
            raise RequestError(
                "repetition_detection needs min_pattern_size <= max_pattern_size and min_count >= 2",
                "repetition_detection",
            )
        return self


class EngineFields(Strict):
    """The fields that chats, completions and `sampling_params` spell alike."""

    # Values that mean "as if it were not there", where these are not null and the empty ones.
    nothing: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "spaces_between_special_tokens": (True,),
        "thinking_token_budget": (-1,),
        "routed_experts_prompt_start": (0,),
    }
    # Fields that no answer to a render-only request depends on, though one to a generation would.
    only_generated: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[TokenId] | None = None
    spaces_between_special_tokens: bool = True
    thinking_token_budget: int | None = None
    stream_interval: int | None = Field(None, ge=1)
    repetition_detection: RepetitionDetection | None = None
    structured_outputs: StructuredOutputs | None = None
    routed_experts_prompt_start: int = Field(0, ge=0)
    watermarking: bool | None = None

    def passed_on(self) -> dict[str, Any]:
        """By their names in `sampling_params`, as JSON has them.

        Raises:
            RequestError: A value that no engine takes; names the field.
        """
        written = {name: _WRITTEN.get(name, _as_it_is)(value) for name, value in self._asked().items()}
        if written.get("prompt_logprobs", 0) < -1:
            raise RequestError("prompt_logprobs must be at least -1", "prompt_logprobs")
        if written.get("thinking_token_budget", 0) < 0:
            raise RequestError("thinking_token_budget must be at least -1", "thinking_token_budget")
        return written

    def unfollowed(self) -> tuple[str, ...]:
        """Names of the fields that ask for what no engine here can do."""
        others = (name for name, plain in self.only_generated.items() if getattr(self, name) not in plain)
        return (*self._asked(), *others)

    def _asked(self) -> dict[str, Any]:
        given = self.model_fields_set & EngineFields.model_fields.keys()
        asked = {name: getattr(self, name) for name in sorted(given)}
        if self.structured_outputs is not None and self.structured_outputs.followed():
            asked.pop("structured_outputs")
        return {name: value for name, value in asked.items() if value not in self.nothing.get(name, _EMPTY)}


def _biases(given: Mapping[str, float]) -> dict[str, float]:
    try:
        return {str(int(token)): min(MAX_BIAS, max(-MAX_BIAS, bias)) for token, bias in given.items()}
    except ValueError as error:
        raise RequestError("logit_bias is by token id", "logit_bias") from error


def _words(given: list[str]) -> list[str]:
    if not all(given):
        raise RequestError("bad_words must not contain an empty string", "bad_words")
    return list(dict.fromkeys(given))


def _as_it_is(value: Any) -> Any:
    return value


_WRITTEN: Mapping[str, Any] = {
    "logit_bias": _biases,
    "bad_words": _words,
    "repetition_detection": RepetitionDetection.model_dump,
    "structured_outputs": StructuredOutputs.given,
}

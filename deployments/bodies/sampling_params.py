"""`sampling_params` of token-in/token-out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import orjson
from pydantic import Field

from deployments.bodies.generation import MAX_TOP_LOGPROBS, sampling_of
from deployments.bodies.strict import UNSUPPORTED, Strict, TokenId
from deployments.calls import SamplingRequest
from renderer.errors import RequestError, UnsupportedFieldError

# Of `structured_outputs`: what has no meaning here, as the library that follows a schema is always the same.
_ANY_STRUCTURED = frozenset({"disable_any_whitespace", "disable_fallback", "_backend", "_backend_was_auto"})


class SamplingBody(Strict):
    """`sampling_params`. What is left out has a plain default, whatever the checkpoint's generation defaults are;
    without `max_tokens` the output may fill the context."""

    # How vLLM hands outputs on inside, and whether it looks for a prefix: no token depends on these.
    ignored: ClassVar[frozenset[str]] = frozenset({"output_kind", "skip_clone", "skip_reading_prefix_cache"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **UNSUPPORTED,
        "extra_args": ({},),
        "routed_experts_prompt_start": (0,),
        "watermarking": (),
    }

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: dict[str, Any] | None = None

    def request(self, text: bool) -> SamplingRequest:
        """
        Args:
            text: Whether the answer has text.

        Raises:
            RequestError: A value that no model could be asked for; names the field.
        """
        if not self.detokenize and (self.stop or text):
            raise RequestError("stop strings, and output_mode text, need detokenize", "detokenize")
        return sampling_of(
            self,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            structured=None if self.structured_outputs is None else structured(self.structured_outputs),
            detokenize=text or bool(self.stop),
        )


def structured(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of `structured_outputs`: `{}` for any JSON object, None where nothing is asked for.

    Raises:
        RequestError: Another kind of constraint is asked for, or the schema is no object.
    """
    asked = {
        name: value for name, value in options.items() if value not in (None, False) and name not in _ANY_STRUCTURED
    }
    schema, any_object = asked.pop("json", None), asked.pop("json_object", None)
    if asked:
        field = f"structured_outputs.{min(asked)[:64]}"
        raise UnsupportedFieldError(f"{field} is not supported, json and json_object are", field)
    if isinstance(schema, str):
        try:
            schema = orjson.loads(schema)
        except orjson.JSONDecodeError as error:
            raise RequestError(f"structured_outputs.json is not JSON: {error.msg}", "structured_outputs") from error
    if schema is not None and not isinstance(schema, dict):
        raise RequestError("structured_outputs.json must be a JSON schema", "structured_outputs")
    return {} if any_object and schema is None else schema

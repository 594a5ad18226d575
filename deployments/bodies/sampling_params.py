"""`sampling_params` of token-in/token-out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from deployments.bodies.engine_fields import EngineFields
from deployments.bodies.generation import MAX_TOP_LOGPROBS, sampling_of
from deployments.bodies.strict import TokenId
from deployments.calls import SamplingRequest
from renderer.errors import RequestError


class SamplingBody(EngineFields):
    """`sampling_params`. What is left out has a plain default, whatever the checkpoint's generation defaults are;
    without `max_tokens` the output may fill the context."""

    # How vLLM hands outputs on inside, and whether it looks for a prefix: no token depends on these.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"output_kind", "output_text_buffer_length", "skip_clone", "skip_reading_prefix_cache"}
    )
    only_generated: ClassVar[Mapping[str, tuple[Any, ...]]] = {"extra_args": ({},)}

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
    extra_args: dict[str, Any] = Field(default_factory=dict)

    def passed_on(self) -> dict[str, Any]:
        """See `EngineFields.passed_on`."""
        return {**super().passed_on(), **({"extra_args": self.extra_args} if self.extra_args else {})}

    def request(self, text: bool) -> SamplingRequest:
        """
        Args:
            text: Whether the answer has text.

        Raises:
            RequestError: A value that no model could be asked for; names the field.
        """
        if not self.detokenize and (self.stop or text):
            raise RequestError("stop strings, and output_mode text, need detokenize", "detokenize")
        structured = self.structured_outputs
        return sampling_of(
            self,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            structured=structured.schema_of_json() if structured is not None and structured.followed() else None,
            detokenize=text or bool(self.stop),
        )

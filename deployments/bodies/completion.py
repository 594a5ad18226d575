"""Bodies of plain prompts."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deployments.bodies.generation import GenerationBody, sampling_of
from deployments.bodies.strict import TokenId
from deployments.calls import SamplingRequest
from renderer.conversation import CompletionRequest
from renderer.errors import RequestError


class CompletionBody(GenerationBody):
    """`POST /v1/completions` and `POST /v1/completions/render`."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]] = ""
    logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True
    max_prompts: ClassVar[int] = 1024
    default_max_tokens: ClassVar[int] = 16

    @property
    def likeliest(self) -> int | None:
        """See `GenerationBody.likeliest`."""
        return self.logprobs

    def sampling(self) -> SamplingRequest:
        limit = self.default_max_tokens if self.max_tokens is None else self.max_tokens
        return sampling_of(self, max_tokens=limit, logprobs=self.likeliest_to_report, structured=self.structured())

    def request(self) -> CompletionRequest:
        return CompletionRequest(
            prompts=self._prompts(),
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            room_for_output=True,
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


def _frozen(prompt: str | int | list[int]) -> str | tuple[int, ...]:
    return tuple(prompt) if isinstance(prompt, list) else str(prompt)

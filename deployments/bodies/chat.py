"""Bodies of conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.bodies.generation import GenerationBody, sampling_of
from deployments.bodies.messages import MessageBody, conversation
from deployments.bodies.strict import Body
from deployments.calls import SamplingRequest
from renderer.conversation import ChatRequest
from renderer.errors import RequestError, UnsupportedFieldError


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


class ConversationBody(Body):
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


class ChatBody(GenerationBody, ConversationBody):
    """`POST /v1/chat/completions`."""

    only_generated: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationBody.only_generated,
        "include_reasoning": (True,),
        "return_prompt_text": (False,),
    }

    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    return_prompt_text: bool = False

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
            room_for_output=self.max_tokens is not None or self.max_completion_tokens is not None,
            cache_salt=self.cache_salt,
        )

    @property
    def likeliest(self) -> int | None:
        """See `GenerationBody.likeliest`."""
        return self.top_logprobs if self.logprobs else None

    def _template_kwargs(self) -> Mapping[str, Any]:
        """Templates know the effort by its name, or only whether the model is to think at all."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        thinks = {"enable_thinking": self.reasoning_effort != "none"}
        return {**thinks, **self.chat_template_kwargs, "reasoning_effort": self.reasoning_effort}

    def sampling(self) -> SamplingRequest:
        newer = self.max_completion_tokens is not None
        return sampling_of(
            self,
            max_tokens=self.max_completion_tokens if newer else self.max_tokens,
            max_tokens_field="max_completion_tokens" if newer else "max_tokens",
            logprobs=self.likeliest_to_report,
            structured=self.structured(),
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

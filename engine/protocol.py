"""What an engine is: rendered prompts in, streams of token ids out.

Engines know token ids and tensors alone; text, stop strings and HTTP live with their callers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from renderer.prompt import RenderedPrompt

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop. Names and meanings are those of the wire protocol.

    Attributes:
        max_tokens: Tokens to generate at most, those of `prior_output_ids` included.
        temperature: 0 is greedy.
        top_k: 0 for no limit.
        seed: With a seed the random number of a token is a function of seed and position alone, so that any
            replica can continue a request.
        stop_token_ids: Tokens that end the output beside the model's end-of-sequence tokens; the last token of an
            output may be one of them.
        logprobs: How many of the likeliest tokens to report beside the sampled one; None for no report.
        structured: A JSON schema that the text must follow, `{}` for any JSON object, None for no constraint.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    structured: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The sampled token's log-probability and the likeliest tokens, likeliest first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What is new since the last output of the same request.

    Attributes:
        token_ids: New tokens, an end-of-sequence or stop token included.
        finish_reason: None until the last output.
        stop_reason: The stop token that ended it, None for the model's own end of sequence.
        num_cached_tokens: Prompt tokens that the prefix cache served; the same in every output of a request.
        logprobs: One entry a new token, where asked for.
        last_is_text: Whether the last token belongs to the text although the reason is `stop`: a grammar ended with it,
            which no end-of-sequence token follows.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    last_is_text: bool = False


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start and levels now.

    `restarts` counts how often the core died and came back, `receiver_misses` how many requests named an
    item that the receiver cache turned out not to hold.
    """

    running: int = 0
    waiting: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    aborted: int = 0
    encoder_runs: int = 0
    encoder_hits: int = 0
    tensors_received: int = 0
    tensor_bytes_received: int = 0
    receiver_items: int = 0
    receiver_bytes: int = 0
    receiver_misses: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    restarts: int = 0
    warmup_s: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """One engine: a core that runs the model, and the caches that it shares with the renderer beside it."""

    async def start(self) -> None:
        """Load the model and warm up; return when the first request would be served at full speed."""

    def generate(
        self, prompt: RenderedPrompt, params: SamplingParams, *, request_id: str, prior_output_ids: Sequence[int] = ()
    ) -> AsyncIterator[EngineOutput]:
        """Stream the output of one request. The prompt's lease is committed here, and closed at the stream's end.

        Args:
            prior_output_ids: Tokens that another replica has generated already: they are not generated or streamed
                again, the output goes on after them, and counts and seeds treat them as this request's own.

        Raises:
            RequestError: The request can never be served (too long for the block pool, a malformed item).
            CacheMissError: An item has neither tensors nor a copy that the engine holds.
            EngineDeadError: The core died; what was streamed so far is valid.
        """

    async def abort(self, request_id: str) -> None:
        """End a request; its stream finishes with reason `abort`. Unknown ids are ignored."""

    async def health(self) -> None:
        """Return if the engine can serve.

        Raises:
            EngineDeadError: It cannot.
        """

    async def stats(self) -> EngineStats: ...

    async def reset_cache(self) -> None:
        """Empty the receiver, encoder and prefix caches, and the sender cache with them."""

    async def reload(self, path: str | None) -> None:
        """Take the weights of another checkpoint of the same shape, in an engine that has no requests.

        What was computed with the old ones (encoder and prefix caches) is forgotten, processed items are kept.

        Args:
            path: A local folder; None for the model's own weights.

        Raises:
            RequestError: There are none that fit; the old ones stay.
            EngineError: It has requests.
            NotSupportedError: This engine cannot.
        """

    async def close(self) -> None: ...

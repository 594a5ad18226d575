"""What one request may ask of an engine."""

from __future__ import annotations

from engine.protocol import SamplingParams
from renderer.errors import ContextLengthError
from renderer.prompt import RenderedPrompt


def check_length(prompt: RenderedPrompt, params: SamplingParams, limit: int) -> None:
    """Refuse what exceeds `limit` tokens of prompt and output together.

    Raises:
        ContextLengthError: It does.
    """
    length = len(prompt.token_ids)
    if length + params.max_tokens > limit:
        raise ContextLengthError(
            f"{length} prompt tokens and {params.max_tokens} tokens of output exceed the {limit} tokens that the "
            "engine holds for one request",
            "max_tokens" if length < limit else "prompt",
        )

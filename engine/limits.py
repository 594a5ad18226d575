"""What one request may ask of a vLLM, here or elsewhere."""

from __future__ import annotations

from engine.protocol import SamplingParams
from renderer.errors import ContextLengthError, RequestError
from renderer.prompt import RenderedPrompt

# Where some tokens have to come before an end, vLLM's runner on a GPU holds at most 128 tokens that end an output, the
# model's own among them. It does not survive one more.
MAX_STOP_TOKEN_IDS = 120


def check_request(prompt: RenderedPrompt, params: SamplingParams, limit: int) -> None:
    """Refuse what exceeds `limit` tokens of prompt and output together, or would end vLLM for everybody.

    Raises:
        RequestError: It does.
    """
    length = len(prompt.token_ids)
    if length + params.max_tokens > limit:
        raise ContextLengthError(
            f"{length} prompt tokens and {params.max_tokens} tokens of output exceed the {limit} tokens that the "
            "engine holds for one request",
            "max_tokens" if length < limit else "prompt",
        )
    stops = len(params.stop_token_ids)
    if params.min_tokens > 0 and stops > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"{stops} stop_token_ids: with min_tokens this engine takes at most {MAX_STOP_TOKEN_IDS}", "stop_token_ids"
        )

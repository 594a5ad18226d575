"""From what a body says about sampling to what an engine is told: ranges, the model's defaults, the context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployments.calls import SamplingRequest
from engine.protocol import SamplingParams
from renderer.errors import ContextLengthError, RequestError

PLAIN_DEFAULTS: Mapping[str, float | int] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
# Inclusive bounds; the penalties' and the temperature's are OpenAI's.
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (-(2**63), 2**63 - 1),
    "top_k": (-1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "n": (1, 16384),
}
# Below this temperature the division of the logits overflows into noise.
LOWEST_TEMPERATURE = 0.01


def check(sampling: SamplingRequest) -> None:
    """Refuse values that no model could be asked for.

    Raises:
        RequestError: Names the field.
    """
    max_tokens_field = sampling.max_tokens_field
    for name, (low, high) in RANGES.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:
            raise RequestError(f"{name} must be between {low} and {high}, got {value}", name)
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise RequestError(f"top_p must be above 0 and at most 1, got {sampling.top_p}", "top_p")
    if sampling.repetition_penalty is not None and sampling.repetition_penalty <= 0:
        raise RequestError(
            f"repetition_penalty must be above 0, got {sampling.repetition_penalty}", "repetition_penalty"
        )
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise RequestError(f"{max_tokens_field} must be at least 1, got {sampling.max_tokens}", max_tokens_field)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise RequestError(f"min_tokens must not exceed {max_tokens_field}", "min_tokens")
    if "" in sampling.stop:
        raise RequestError("stop must not contain an empty string", "stop")


def resolve(
    sampling: SamplingRequest, defaults: Mapping[str, Any], prompt_tokens: int, max_model_len: int
) -> SamplingParams:
    """What the engine is told for a prompt of this length.

    Args:
        defaults: The checkpoint's generation defaults, by the names of its `generation_config.json`.
        prompt_tokens: Length of the prompt, expanded images included.
        max_model_len: Tokens of prompt and output together.

    Raises:
        ContextLengthError: Nothing can be generated after this prompt, or more is asked for than the model could.
        RequestError: Several choices of a greedy request, which would all be the same.
    """
    chosen = {name: _chosen(name, sampling, defaults, plain) for name, plain in PLAIN_DEFAULTS.items()}
    temperature = float(chosen["temperature"])
    if temperature == 0:
        if sampling.n > 1:
            raise RequestError(f"n must be 1 where temperature is 0, got {sampling.n}", "n")
        chosen |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    else:
        temperature = max(temperature, LOWEST_TEMPERATURE)
    return SamplingParams(
        max_tokens=_max_tokens(sampling, defaults, prompt_tokens, max_model_len),
        temperature=temperature,
        top_p=float(chosen["top_p"]),
        top_k=max(int(chosen["top_k"]), 0),
        min_p=float(chosen["min_p"]),
        presence_penalty=float(chosen["presence_penalty"]),
        frequency_penalty=float(chosen["frequency_penalty"]),
        repetition_penalty=float(chosen["repetition_penalty"]),
        seed=None if sampling.seed == -1 else sampling.seed,
        stop_token_ids=tuple(dict.fromkeys(sampling.stop_token_ids)),
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        structured=None if sampling.structured is None else dict(sampling.structured),
    )


def _chosen(name: str, sampling: SamplingRequest, defaults: Mapping[str, Any], plain: float | int) -> float | int:
    value = getattr(sampling, name)
    if value is None:
        value = defaults.get(name)
    return plain if value is None else value


def _max_tokens(sampling: SamplingRequest, defaults: Mapping[str, Any], prompt_tokens: int, max_model_len: int) -> int:
    asked, field = sampling.max_tokens, sampling.max_tokens_field
    left = max_model_len - prompt_tokens
    if left < 1:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens, images included; the model takes {max_model_len} in all, "
            "and at least 1 must be left for the output",
            "max_tokens",
        )
    if asked is not None and asked > max_model_len:
        raise ContextLengthError(f"{field} is {asked}, the model takes {max_model_len} tokens in all", field)
    wanted = asked if asked is not None else defaults.get("max_new_tokens")
    return left if wanted is None else min(left, int(wanted))

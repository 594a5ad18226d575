"""From a submission to a request that can run: everything that could be wrong with it is found here, before it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.config import EngineConfig
from engine.messages import Submit
from engine.model import Model
from engine.protocol import SamplingParams
from engine.request import Request, RequestItem, new_seed
from renderer.errors import ConfigError, ContextLengthError, RequestError
from renderer.prompt import PlaceholderRange, Tensors

_SMALLEST, _LARGEST = 1e-9, 1e9


class Admission:
    """Raises ConfigError where the configured length does not fit the model or its blocks."""

    def __init__(self, config: EngineConfig, model: Model) -> None:
        self._model = model
        self._block_size = config.block_size
        self.max_model_len = _model_len(config.max_model_len, model.max_positions, model.num_blocks * config.block_size)

    def admit(self, message: Submit, tensors: Sequence[Tensors]) -> Request:
        """The request, without its grammar.

        Raises:
            RequestError: It can never be served.
        """
        prompt, prior, params = message.token_ids, message.prior_output_ids, message.params
        total = len(prompt) + params.max_tokens
        self._check_params(params)
        self._check_length(len(prompt), params.max_tokens)
        self._check_tokens(message)
        for index, (item, place) in enumerate(zip(tensors, message.ranges, strict=True)):
            self._check_item(index, item, place)
        known = len(prompt) + len(prior)
        tokens = np.zeros(max(total, known), dtype=np.int32)
        tokens[: len(prompt)] = prompt
        tokens[len(prompt) : known] = prior
        positions, delta = self._model.family.positions(prompt, list(zip(message.ranges, tensors, strict=True)))
        keys = [item.cache_key for item in message.submission.items]
        return Request(
            key=message.key,
            tokens=tokens,
            num_prompt=len(prompt),
            num_tokens=known,
            params=params,
            items=tuple(map(RequestItem, keys, message.ranges, tensors)),
            positions=positions,
            delta=delta,
            cache_salt=message.cache_salt,
            seed=new_seed(params),
            grammar=None,
            block_table=np.zeros(self._blocks_for(total), dtype=np.int32),
        )

    def _check_length(self, prompt: int, max_tokens: int) -> None:
        if prompt == 0:
            raise RequestError("the prompt has no tokens", "prompt")
        if prompt + max_tokens > self.max_model_len:
            raise ContextLengthError(
                f"{prompt} prompt tokens and {max_tokens} tokens of output exceed the {self.max_model_len} tokens "
                "that this engine holds for one request",
                "max_tokens" if prompt < self.max_model_len else "prompt",
            )

    def _check_tokens(self, message: Submit) -> None:
        limit = self._model.vocab_size
        fields = {
            "prompt": message.token_ids,
            "prior_output_ids": message.prior_output_ids,
            "stop_token_ids": np.array(message.params.stop_token_ids),
        }
        for field, ids in fields.items():
            if len(ids) and (ids.min() < 0 or ids.max() >= limit):
                raise RequestError(f"a token of {field} is outside the vocabulary of {limit} tokens", field)

    def _check_params(self, params: SamplingParams) -> None:
        """What is out of bounds here would fail a step, and with it every request of the step."""
        bounds: dict[str, tuple[float, float]] = {
            "max_tokens": (1, math.inf),
            "min_tokens": (0, math.inf),
            "temperature": (0, _LARGEST),
            "top_p": (_SMALLEST, 1),
            "top_k": (0, math.inf),
            "min_p": (0, 1),
            "presence_penalty": (-_LARGEST, _LARGEST),
            "frequency_penalty": (-_LARGEST, _LARGEST),
            "repetition_penalty": (_SMALLEST, _LARGEST),
            "logprobs": (0, self._model.vocab_size),
        }
        for field, (low, high) in bounds.items():
            value = getattr(params, field)
            if value is not None and not low <= value <= high:  # written so that NaN is refused
                raise RequestError(f"{field} must be between {low} and {high}, got {value}", field)

    def _check_item(self, index: int, tensors: Tensors, place: PlaceholderRange) -> None:
        try:
            embeds = self._model.family.check(tensors)
        except RequestError as error:
            raise RequestError(f"item {index}: {error}", error.param) from error
        if embeds != place.num_embeds:
            raise RequestError(f"item {index} has {embeds} embeddings and stands where {place.num_embeds} belong")

    def _blocks_for(self, tokens: int) -> int:
        """Blocks for all but the last token, whose keys and values nobody reads."""
        return max(1, -(-(tokens - 1) // self._block_size))


def _model_len(wanted: int | None, positions: int, held: int) -> int:
    if wanted is None:
        return min(positions, held)
    if wanted > positions:
        raise ConfigError(f"max_model_len={wanted} exceeds the model's {positions} positions")
    if wanted > held:
        raise ConfigError(f"max_model_len={wanted} exceeds the {held} tokens that kv_cache_bytes has room for")
    return wanted

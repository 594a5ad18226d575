"""The next token of each sequence, out of its logits.

The random number of a token is a function of the request's seed and the token's place in the output alone: neither the
other requests of a step nor the replica that runs it have a part in the choice, so that another one can go on with it.
Every row is treated by its own parameters, never by those of its neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.grammar import Grammar
from engine.protocol import SamplingParams, TokenLogprobs
from engine.request import Request


@torch.inference_mode()
def sample(
    logits: torch.Tensor, requests: Sequence[Request], eos_ids: frozenset[int]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Choose one token a request.

    Args:
        logits: float32 [requests, vocabulary]; changed in place.

    Returns:
        Tokens, and what was asked to be reported of each: log-probabilities of the model itself, before penalties
        and temperature.
    """
    reported = _raw_logprobs(logits, requests)
    for row, request in enumerate(requests):
        _adjust(logits[row], request, eos_ids)
    tokens = logits.argmax(dim=-1)
    random = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if random:
        tokens[random] = _sample_rows(logits, requests, random)
    chosen = [int(token) for token in tokens.tolist()]
    return chosen, [
        None if row not in reported else _report(reported[row], token, requests[row].params)
        for row, token in enumerate(chosen)
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at this place of the output."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _adjust(row: torch.Tensor, request: Request, eos_ids: frozenset[int]) -> None:
    """Penalties, no end before `min_tokens`, and the grammar.

    The repetition penalty counts tokens of prompt and output, the other two those of the output.
    """
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(request.tokens[: request.num_tokens]).astype(np.int64)).to(row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(request.output_ids, return_counts=True)
        penalties = params.presence_penalty + params.frequency_penalty * counts
        row[torch.from_numpy(ids.astype(np.int64)).to(row.device)] -= torch.from_numpy(penalties).to(row)
    ends = _held_back(request, eos_ids)
    if request.grammar is not None:
        allowed = torch.from_numpy(_allowed(request.grammar, ends)).to(row.device)
        row.masked_fill_(~allowed, -torch.inf)
    elif ends:
        row[ends] = -torch.inf


def _held_back(request: Request, eos_ids: frozenset[int]) -> list[int]:
    """Tokens that would end the output too early."""
    params = request.params
    if request.num_outputs >= params.min_tokens:
        return []
    return sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)})


def _allowed(grammar: Grammar, ends: list[int]) -> NDArray[np.bool_]:
    """What may follow by the grammar, ends only where it leaves nothing else: it counts for more than `min_tokens`."""
    allowed = grammar.allowed()
    others = allowed.copy()
    others[ends] = False
    return others if others.any() else allowed


def _sample_rows(logits: torch.Tensor, requests: Sequence[Request], rows: Sequence[int]) -> torch.Tensor:
    """int64 [rows]. Rows that cut the distribution are sorted for it, the others are spared that."""
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    cut = [index for index, row in enumerate(rows) if _cuts(requests[row].params)]
    whole = [index for index, row in enumerate(rows) if not _cuts(requests[row].params)]
    for indices, choose in ((cut, _sample_cut), (whole, _sample_whole)):
        if indices:
            chosen = [requests[rows[index]] for index in indices]
            temperature = logits.new_tensor([request.params.temperature for request in chosen])[:, None]
            probs = torch.softmax(logits[[rows[index] for index in indices]] / temperature, dim=-1)
            draws = [uniform(request.seed, request.num_outputs) for request in chosen]
            picked = choose(probs, [request.params for request in chosen], probs.new_tensor(draws).double())
            tokens[indices] = picked
    return tokens


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _sample_whole(probs: torch.Tensor, params: Sequence[SamplingParams], draws: torch.Tensor) -> torch.Tensor:
    return _invert(probs, draws)


def _sample_cut(probs: torch.Tensor, params: Sequence[SamplingParams], draws: torch.Tensor) -> torch.Tensor:
    """Keep what min_p, top_k and top_p all leave: the likeliest tokens, up to the one that crosses top_p included."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    top_k = probs.new_tensor([param.top_k or probs.shape[-1] for param in params])[:, None]
    top_p = probs.new_tensor([param.top_p for param in params])[:, None]
    min_p = probs.new_tensor([param.min_p for param in params])[:, None]
    keep = torch.arange(probs.shape[-1], device=probs.device) < top_k
    keep &= ordered >= min_p * ordered[:, :1]
    ordered = ordered * keep
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    ordered = ordered * (ordered.cumsum(dim=-1) - ordered < top_p)
    return order.gather(-1, _invert(ordered, draws)[:, None])[:, 0]


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The first token at which the cumulated weight exceeds the drawn share of the whole."""
    cumulated = weights.double().cumsum(dim=-1)
    target = draws[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _raw_logprobs(logits: torch.Tensor, requests: Sequence[Request]) -> dict[int, torch.Tensor]:
    rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    return dict(zip(rows, logits[rows].log_softmax(dim=-1), strict=True)) if rows else {}


def _report(logprobs: torch.Tensor, token_id: int, params: SamplingParams) -> TokenLogprobs:
    own = logprobs[token_id]
    rank = int((logprobs > own).sum()) + 1
    values, ids = logprobs.topk(params.logprobs or 0)
    return TokenLogprobs(token_id, float(own), rank, tuple(zip(ids.tolist(), values.tolist(), strict=True)))

"""Where an operation runs, and with which of the two processors: a pure decision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from renderer.errors import NotSupportedError

Backend = Literal["transformers", "vllm", "remote"]


class Tier(StrEnum):
    RENDER = "render"
    ENGINE = "engine"


class Operation(StrEnum):
    CHAT_COMPLETIONS = "chat_completions"
    COMPLETIONS = "completions"
    GENERATE_PARTS = "generate_parts"  # token ids and raw media
    GENERATE_FEATURES = "generate_features"  # token ids and processed media
    RENDER_CHAT = "render_chat"
    RENDER_COMPLETION = "render_completion"
    RENDER_TOKENS = "render_tokens"
    LAYOUT = "layout"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    DERENDER = "derender"
    BORROWED = "borrowed"  # items of a generation, processed for the engine replica that asks


GENERATION = frozenset(
    {Operation.CHAT_COMPLETIONS, Operation.COMPLETIONS, Operation.GENERATE_PARTS, Operation.GENERATE_FEATURES}
)
WITHOUT_MEDIA = frozenset({Operation.GENERATE_FEATURES, Operation.DETOKENIZE, Operation.DERENDER})
WITHOUT_PIXELS = WITHOUT_MEDIA | {Operation.LAYOUT, Operation.TOKENIZE}


@dataclass(frozen=True, slots=True)
class Tiers:
    """What this deployment has. `render_full`: every render replica is at its limit and overflow is allowed."""

    render: bool
    engine: Backend | None
    render_full: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """`skip_mm_cache`: True for the readonly processor, None where nothing is rendered."""

    tier: Tier
    skip_mm_cache: bool | None
    pixels: bool


def choose_tier(operation: Operation, tiers: Tiers) -> Decision:
    """The tier that serves an operation.

    The readonly processor is never used for a request that an engine beside the renderer is about to run; a remote
    engine cannot share a cache with a renderer, so there it is used for everything.

    Raises:
        NotSupportedError: The operation needs an engine and there is none.
    """
    skip = _skip_mm_cache(operation, tiers.engine)
    pixels = operation not in WITHOUT_PIXELS
    if operation in GENERATION:
        if tiers.engine is None:
            raise NotSupportedError(f"{operation}: this deployment has no engine tier, it only renders")
        return Decision(Tier.ENGINE, skip, pixels)
    if tiers.render and not (tiers.render_full and tiers.engine):
        return Decision(Tier.RENDER, skip, pixels)
    if tiers.engine is None:
        raise NotSupportedError(f"{operation}: this deployment has neither a render tier nor an engine tier")
    return Decision(Tier.ENGINE, skip, pixels)


def _skip_mm_cache(operation: Operation, engine: Backend | None) -> bool | None:
    if operation in WITHOUT_MEDIA:
        return None
    if operation in GENERATION or operation is Operation.BORROWED:
        return engine == "remote"
    return True

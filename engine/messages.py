"""What crosses between an engine and its core: one class a message, by receiver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.grammar import Grammar
from engine.protocol import EngineOutput, EngineStats, SamplingParams
from renderer.caches import Submission
from renderer.errors import GreenroomError
from renderer.prompt import PlaceholderRange

# To the core. Messages are obeyed in the order in which they are sent.


@dataclass(frozen=True, slots=True)
class Submit:
    """One request.

    Attributes:
        key: The engine's number for it, never used twice in a core's life.
        token_ids: int32 [n], the prompt.
        ranges: One an item of the submission, in the same order.
        prior_output_ids: int32 [m], output that another replica has produced.
    """

    key: int
    token_ids: NDArray[np.int32]
    ranges: tuple[PlaceholderRange, ...]
    submission: Submission
    params: SamplingParams
    prior_output_ids: NDArray[np.int32]
    cache_salt: str | None


@dataclass(frozen=True, slots=True)
class Abort:
    """End requests. `silent` where nobody waits for the last output."""

    keys: tuple[int, ...]
    silent: bool


@dataclass(frozen=True, slots=True)
class Call:
    """A question or command that is answered with a Reply of the same number.

    Attributes:
        drop: Items that the receiver drops (`reset_cache`): those of the sender cache that nobody has pinned.
        weights: Path of the checkpoint whose weights to take (`reload`); None for the model's own.
    """

    number: int
    operation: Literal["stats", "reset_cache", "reload"]
    drop: tuple[str, ...] = ()
    weights: str | None = None


ToCore = Submit | Abort | Call

# Within the core.


@dataclass(frozen=True, slots=True)
class Compiled:
    """The grammar of a request that waited for it, or why there is none."""

    key: int
    result: Grammar | GreenroomError


# From the core.


@dataclass(frozen=True, slots=True)
class Ready:
    """The core is loaded and warm.

    Attributes:
        max_model_len: Tokens of prompt and output together that any one request may have here.
    """

    max_model_len: int
    warmup_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class StartFailed:
    error: GreenroomError


@dataclass(frozen=True, slots=True)
class Outputs:
    """Everything that one step brought, by the requests' keys."""

    outputs: tuple[tuple[int, EngineOutput], ...]
    failures: tuple[tuple[int, GreenroomError], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """`error`: why what was asked for was not done."""

    number: int
    stats: EngineStats
    error: GreenroomError | None = None


FromCore = Ready | StartFailed | Outputs | Reply

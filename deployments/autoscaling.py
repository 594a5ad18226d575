"""How many replicas a tier needs for the work that waits in it.

Replicas report figures through `record_autoscaling_stats`: what is under way and waiting, as seconds of work, requests
or tokens, never as a number of calls alone (a layout and a request with 64 images are not the same load). A policy
compares the sum of a figure with what one replica should carry of it. Serve applies bounds, factors and delays around
the policy.

The policies run in Serve's controller, which gets this module pickled by value: it imports the standard library alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# CPU seconds of rendering, measured on one core over JPEG and PNG from 0.05 to 12 megapixels: within a factor of 2.
SECONDS_PER_REQUEST = 0.3e-3
SECONDS_PER_PIXEL = 12e-9
SECONDS_PER_BYTE = 3e-9
SECONDS_PER_CHARACTER = 0.5e-6
# Of a photograph as JPEG: a guess for whoever has the bytes of an image and not its header.
PIXELS_PER_BYTE = 5

# Figures that tiers report. A figure of a tier may be reported by its own replicas and by routers, which also see what
# no replica of the tier has yet.
RENDER_SECONDS = "render_seconds"
ENGINE_SEQUENCES = "engine_sequences"
ENGINE_PROMPT_TOKENS = "engine_prompt_tokens"


def render_seconds(requests: int = 1, pixels: int | None = 0, media_bytes: int = 0, characters: int = 0) -> float:
    """An estimate of the CPU seconds that rendering takes.

    Args:
        pixels: Of the images that are decoded; 0 for a layout, None where only their bytes are known.
    """
    if pixels is None:
        pixels = PIXELS_PER_BYTE * media_bytes
    return (
        SECONDS_PER_REQUEST * requests
        + SECONDS_PER_PIXEL * pixels
        + SECONDS_PER_BYTE * media_bytes
        + SECONDS_PER_CHARACTER * characters
    )


def replicas_for(figures: Mapping[str, float], carried: Mapping[str, float]) -> float:
    """Replicas that carry all of every figure; 0 only where there is nothing.

    Args:
        carried: What one replica should have of each figure. A figure that is not named here is not looked at.
    """
    return max((figures.get(name, 0.0) / amount for name, amount in carried.items()), default=0.0)


class Gauge:
    """Work under way, read as its mean since the last reading: short work between two readings counts in proportion.

    Used from one thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Counted in whole billionths: sums of floats leave rests, which would keep a tier from shrinking to nothing.
        self._billionths = 0
        self._area = 0.0
        self._begun = self._changed = clock()

    @property
    def level(self) -> float:
        """What is under way now."""
        return self._billionths / 1e9

    def add(self, amount: float) -> None:
        now = self._clock()
        self._area += self.level * (now - self._changed)
        self._changed = now
        self._billionths += round(amount * 1e9)

    @contextmanager
    def under_way(self, amount: float) -> Iterator[None]:
        self.add(amount)
        try:
            yield
        finally:
            self.add(-amount)

    def mean(self) -> float:
        """Mean since the last call; ends the period."""
        self.add(0.0)
        seconds = self._changed - self._begun
        mean = self._area / seconds if seconds > 0 else self.level
        self._area, self._begun = 0.0, self._changed
        return mean


class TierPolicy:
    """Scales one deployment on its own replicas' figures.

    Args:
        carried: See `replicas_for`.
    """

    def __init__(self, carried: Mapping[str, float]) -> None:
        self._carried = dict(_positive(carried))

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        return decide(context, reported(context), self._carried), {}


class ApplicationPolicy:
    """Scales every deployment of an application, seeing all their figures.

    A figure is taken from the deployment that reports most of it: routers see what waits in front of a tier, a tier
    sees what came to it past the routers, and what both see is the same work. So a tier of no replicas starts when a
    router reports work for it, also where that work is being served elsewhere meanwhile.

    Args:
        tiers: For a deployment's name, what one of its replicas carries of each figure; deployments that are not named
            scale on requests, as Serve's own policy does.
    """

    def __init__(self, tiers: Mapping[str, Mapping[str, float]]) -> None:
        self._tiers = {name: dict(_positive(carried)) for name, carried in tiers.items()}

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, float], dict[Any, dict[str, Any]]]:
        figures = most([reported(context) for context in contexts.values()])
        return {key: self._decide(context, figures) for key, context in contexts.items()}, {}

    def _decide(self, context: Any, figures: Mapping[str, float]) -> float:
        carried = self._tiers.get(context.deployment_name)
        if carried is not None:
            return decide(context, figures, carried)
        return settled(context, context.total_num_requests / context.config.get_target_ongoing_requests())


def decide(context: Any, figures: Mapping[str, float], carried: Mapping[str, float]) -> float:
    """Replicas for a deployment. Where nobody has told a figure yet, it stays as it is."""
    if not figures.keys() & carried.keys() and context.current_num_replicas > 0:
        return float(context.target_num_replicas)
    return settled(context, replicas_for(figures, carried))


def settled(context: Any, replicas: float) -> float:
    """Whole replicas, and while the first ones are only starting no fewer than these.

    Serve's delays do not hold while no replica runs: a need that wavers would stop replicas that are being started.
    """
    whole = at_least_one(replicas, context.total_num_requests)
    starting = context.target_num_replicas if context.current_num_replicas == 0 else 0
    return float(max(whole, starting)) if whole > 0 else whole


def reported(context: Any) -> dict[str, float]:
    """Sums of a deployment's figures over its replicas, what waits in handles for a replica to take it included."""
    factor = _waiting_factor(context)
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    return {name: factor * sum(by_replica.values()) for name, by_replica in metrics.items()}


def most(figures: list[dict[str, float]]) -> dict[str, float]:
    """The largest value of each figure."""
    names = {name for each in figures for name in each}
    return {name: max(each.get(name, 0.0) for each in figures) for name in names}


def at_least_one(replicas: float, requests: float) -> float:
    """Whole replicas; one where there is a request, however small its work. A thousandth too much is no reason."""
    return float(max(math.ceil(replicas - 1e-3), 1 if requests > 0 or replicas > 0 else 0))


def _waiting_factor(context: Any) -> float:
    """All requests for each one that a replica has taken: those that wait count as the mean one that was taken does.

    1 where none has been taken: nothing is known of them then.
    """
    taken = context.total_num_requests - context.total_queued_requests
    return float(context.total_num_requests / taken) if taken > 0 else 1.0


def _positive(carried: Mapping[str, float]) -> Mapping[str, float]:
    wrong = [name for name, amount in carried.items() if amount <= 0]
    if wrong or not carried:
        raise ValueError(f"a replica must carry something of at least one figure, and more than nothing: {carried}")
    return carried

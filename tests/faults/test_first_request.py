"""A fresh replica's first request costs what its later ones do: times as the replicas tell them, one by one."""

from __future__ import annotations

import asyncio
import io
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.faults.cluster import START_S, Deployed, RayCluster
from tests.faults.conftest import PATIENT
from tests.faults.traffic import Answer, Ask, ask_once, client
from tests.stack.helpers import SIDE, Picture, about

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S)]

REPLICAS = 4
LATER = 10
BUDGET = 1.2
# No picture is remembered from its last time: it is the work of a request that is compared.
UNCACHED = {**PATIENT, "renderer": {**PATIENT["renderer"], "processor_cache_bytes": 0}}
STAGES = {"render": ("render", "write"), "engine": ("render", "first_token")}


@pytest.fixture(scope="module")
def app(cluster: RayCluster) -> Iterator[Deployed]:
    app = Deployed("first", cluster, UNCACHED, **_numbers())
    app.wait_for_replicas(RenderReplica=REPLICAS, EngineReplica=REPLICAS)
    yield app
    app.close()


def test_a_replicas_first_request_takes_at_most_a_fifth_more_than_its_later_ones(app: Deployed) -> None:
    ratios = {tier: asyncio.run(_ratios(app, tier)) for tier in STAGES}
    for tier, found in ratios.items():
        print(f"{tier}: first / later of {len(found)} replicas: {', '.join(f'{each:.2f}' for each in sorted(found))}")
    medians = {tier: statistics.median(found) for tier, found in ratios.items()}
    assert all(median <= BUDGET for median in medians.values()), medians


async def _ratios(app: Deployed, tier: str) -> list[float]:
    """The time of each replica's first request over the median of its next ones."""
    times: dict[str, list[float]] = defaultdict(list)
    numbers = itertools.count()
    async with client(app.url) as http:
        while len(times) < REPLICAS or min(map(len, times.values())) <= LATER:
            answer = await ask_once(http, _ask(tier, next(numbers)))
            times[answer.replica].append(_milliseconds(answer, tier))
    return [each[0] / statistics.median(each[1:]) for each in times.values()]


def _ask(tier: str, number: int) -> Ask:
    """About a picture that nobody has seen: an engine's caches would answer for one that it has."""
    stream = io.BytesIO()
    noise = np.random.default_rng([number, len(tier)]).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    messages = about(Picture(stream.getvalue(), "none"))
    if tier == "render":
        return Ask("render", "/v1/chat/completions/render", {"messages": messages})
    return Ask("chat", "/v1/chat/completions", {"messages": messages, "max_tokens": 1, "temperature": 0})


def _milliseconds(answer: Answer, tier: str) -> float:
    """What the request took in the replica, waiting for a thread apart."""
    return sum(answer.timing[stage] for stage in STAGES[tier])


def _numbers() -> dict[str, dict[str, object]]:
    numbers = {"Router": 1, "RenderReplica": REPLICAS, "EngineReplica": REPLICAS}
    return {name: {"num_replicas": number, "autoscaling_config": None} for name, number in numbers.items()}

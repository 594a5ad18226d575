"""Which place a request takes, by what runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from deployments.admission import Lane, Share
from deployments.backends import LocalBackend
from deployments.config import GreenroomConfig
from deployments.front import Front
from deployments.records import Record
from deployments.rendering import RenderOnly
from deployments.tier import Operation, Tier
from renderer.errors import OverloadedError
from renderer.renderer import Renderer

CONFIG = GreenroomConfig.model_validate(
    {
        "model": "demo/model",
        "renderer": {"media_threads": 1, "render_threads": 1},
        "router": {
            "overflow": True,
            "admission": {"render": {"requests": 2}, "generation": {"requests": 4}, "overflow": {"requests": 3}},
        },
    }
)


class Cluster(LocalBackend):
    """Renders here; how many replicas run elsewhere is a test's."""

    replicas: Mapping[Tier, int] = {}
    part = Share()

    def running(self, tier: Tier) -> int:
        return self.replicas[tier]

    def share(self) -> Share:
        return self.part


@pytest.fixture
def cluster(renderer: Renderer) -> Cluster:
    return Cluster(RenderOnly(renderer, Record("render")))


def lanes(front: Front, generations: int, renderings: int) -> list[Lane]:
    """Where so many render-only requests go beside so many generations, until one is refused."""
    with ExitStack() as stack:
        for _ in range(generations):
            stack.enter_context(front.admit(Operation.CHAT_COMPLETIONS))
        taken = []
        for _ in range(renderings):
            try:
                taken.append(stack.enter_context(front.admit(Operation.RENDER_CHAT)).lane)
            except OverloadedError:
                break
        return taken


HERE, THERE = Lane.RENDER, Lane.OVERFLOW


@pytest.mark.parametrize(
    ("renders", "engines", "generations", "taken"),
    [
        (1, 1, 0, [HERE, HERE, THERE, THERE, THERE]),
        (1, 1, 2, [HERE, HERE, THERE]),
        (1, 1, 4, [HERE, HERE]),
        (2, 1, 4, [HERE, HERE, HERE, HERE]),
        (
            0,
            1,
            0,
            [THERE, THERE, THERE, HERE, HERE],
        ),  # what finds no engine waits: the tier starts
        (0, 1, 4, [HERE, HERE]),
        (0, 0, 0, [HERE, HERE]),
    ],
)
def test_render_only_requests_take_the_render_tier_then_engines_and_wait_where_there_is_neither(
    cluster: Cluster, renders: int, engines: int, generations: int, taken: list[Any]
) -> None:
    cluster.replicas = {Tier.RENDER: renders, Tier.ENGINE: engines}
    assert lanes(Front(CONFIG, cluster), generations, 9) == taken


@pytest.mark.parametrize(
    ("routers", "renders", "taken"), [(1, 2, [4]), (2, 2, [2, 2]), (3, 2, [2, 1, 1]), (3, 1, [1, 1, 1])]
)
def test_routers_share_a_tiers_limit(cluster: Cluster, routers: int, renders: int, taken: list[int]) -> None:
    cluster.replicas = {Tier.RENDER: renders, Tier.ENGINE: 0}
    found = []
    for place in range(routers):
        cluster.part = Share(place, routers)
        found.append(len(lanes(Front(CONFIG, cluster), 0, 9)))
    assert found == taken

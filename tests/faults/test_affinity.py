"""Two hundred conversations over three engine replicas and two routers: who holds them, as replicas come and go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.faults.cluster import START_S, Deployed, RayCluster, kill
from tests.faults.conftest import PATIENT
from tests.faults.traffic import client
from tests.stack.helpers import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S)]

CONVERSATIONS = 200
AT_ONCE = 6
ENGINES = 3
HITS = 0.9
# What a replica that comes or goes may move beyond its own share.
BEYOND = 0.05


@dataclass
class Conversation:
    """One client's.

    Attributes:
        homes: The replica that answered each turn.
    """

    messages: list[dict[str, Any]]
    homes: list[str] = field(default_factory=list)

    async def turn(self, http: httpx.AsyncClient) -> None:
        body = {"messages": self.messages, "temperature": 0, "max_tokens": 4}
        response = await http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        self.homes.append(response.headers["X-Greenroom-Replica"])
        self.messages.append(response.json()["choices"][0]["message"])
        self.messages.append({"role": "user", "content": "And then?"})


def numbers(engines: int) -> dict[str, dict[str, Any]]:
    fixed = {"Router": 2, "RenderReplica": 1, "EngineReplica": engines}
    return {name: {"num_replicas": number, "autoscaling_config": None} for name, number in fixed.items()}


@pytest.fixture(scope="module")
def app(cluster: RayCluster) -> Iterator[Deployed]:
    app = Deployed("affinity", cluster, PATIENT, **numbers(ENGINES))
    app.wait_for_replicas(Router=2, EngineReplica=ENGINES)
    yield app
    app.close()


@pytest.fixture(scope="module")
def conversations(app: Deployed) -> list[Conversation]:
    """Each with its first turn."""
    talks = [
        Conversation([{"role": "user", "content": f"I am client {number}. Hello."}]) for number in range(CONVERSATIONS)
    ]
    turn(app, talks)
    return talks


def test_later_turns_reach_the_replica_that_holds_the_conversation(
    app: Deployed, conversations: list[Conversation]
) -> None:
    for _ in range(2):
        turn(app, conversations)
    later = [(before, home) for talk in conversations for before, home in zip(talk.homes, talk.homes[1:], strict=False)]
    hits = sum(before == home for before, home in later)
    print(f"{hits} of {len(later)} later turns hit; first turns: {Counter(talk.homes[0] for talk in conversations)}")
    assert hits >= HITS * len(later)
    assert len({talk.homes[0] for talk in conversations}) == ENGINES


def test_a_replica_that_comes_or_goes_moves_its_share_and_little_more(
    app: Deployed, conversations: list[Conversation]
) -> None:
    for engines in (ENGINES + 1, ENGINES):
        app.update(PATIENT, **numbers(engines))
        app.wait_for_replicas(EngineReplica=engines)
        wait_until(lambda: len(app.tiers()["engine"]) == len(names(app)), 60, "routers know who is there")
        moved = turn(app, conversations)
        print(f"{len(moved)} of {CONVERSATIONS} moved when there were {engines}")
        assert len(moved) <= (1 / (ENGINES + 1) + BEYOND) * CONVERSATIONS
        assert moved, "somebody's favourite is another one now"


def test_a_killed_replica_moves_its_own_conversations_and_no_other_until_its_replacement_draws_its_share(
    app: Deployed, conversations: list[Conversation]
) -> None:
    victim = app.replicas("EngineReplica")[0]
    others = [talk for talk in conversations if talk.homes[-1] != victim.name]
    kill(victim.pid)
    moved = turn(app, others)
    newcomers = names(app) - {talk.homes[-2] for talk in others} - {victim.name}
    strays = [talk for talk in moved if talk.homes[-1] not in newcomers]
    print(f"{len(moved)} of {len(others)} of the others' moved, {len(strays)} not to the replacement")
    assert strays == []
    turn(app, conversations)
    app.wait_for_replicas(EngineReplica=ENGINES)
    moved = turn(app, conversations)
    assert len(moved) <= (1 / ENGINES + BEYOND) * CONVERSATIONS


def turn(app: Deployed, talks: list[Conversation]) -> list[Conversation]:
    """A turn of every conversation, a few at once; those that another replica answered than the last one."""

    async def run() -> None:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(http: httpx.AsyncClient, talk: Conversation) -> None:
            async with places:
                await talk.turn(http)

        async with client(app.url) as http, asyncio.TaskGroup() as group:
            for talk in talks:
                group.create_task(one(http, talk))

    asyncio.run(run())
    return [talk for talk in talks if len(talk.homes) > 1 and talk.homes[-1] != talk.homes[-2]]


def names(app: Deployed) -> set[str]:
    return {replica.name for replica in app.replicas("EngineReplica")}

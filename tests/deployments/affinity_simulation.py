"""Conversations in turns over replicas behind routers that share nothing: a small seeded discrete-event simulation."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

from deployments.affinity import Load, LoadBound, place, rank


@dataclass(frozen=True, slots=True)
class Scenario:
    """A closed system: every conversation waits for its answer, thinks, and asks again.

    Attributes:
        busy: Mean requests under way in the whole system, as a share of what the replicas' engines run at once.
        batch: Requests that one engine runs at once; more share its time.
        limit: Requests under way that a replica accepts.
    """

    bound: LoadBound
    busy: float
    replicas: int = 3
    routers: int = 2
    conversations: int = 200
    turns: int = 8
    batch: int = 32
    limit: int = 64
    answer_s: float = 4.0
    seed: int = 0

    @property
    def think_s(self) -> float:
        """Pause between turns that makes the system as busy as it should be: Little's law for a closed system."""
        under_way = self.busy * self.replicas * self.batch
        return max(0.0, self.answer_s * (self.conversations / under_way - 1))


@dataclass(slots=True)
class Outcome:
    """Attributes:
    later: Turns after the first.
    same: Those that went where the turn before went.
    held: Those that went where any earlier turn of the conversation went.
    waited: Requests placed on a replica that ran a full batch while another had room for one in its own.
    refused: Requests that found every replica at its limit.
    peak: Highest load of a replica seen by an arrival, by the mean load then.
    """

    later: int = 0
    same: int = 0
    held: int = 0
    requests: int = 0
    waited: int = 0
    refused: int = 0
    peak: float = 0.0
    served: Counter[str] = field(default_factory=Counter)

    @property
    def hit_rate(self) -> float:
        return self.held / self.later

    @property
    def stay_rate(self) -> float:
        return self.same / self.later


class Router:
    """One router's view: its own requests, and what a replica's last answer said, corrected by its own since."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self.known: dict[str, int] = {}

    def loads(self, replicas: list[str], limit: int) -> dict[str, Load]:
        return {name: Load(max(self.own[name], self.known.get(name, 0)), limit) for name in replicas}

    def sent(self, replica: str, under_way: int) -> None:
        self.own[replica] += 1
        self.known[replica] = under_way

    def done(self, replica: str) -> None:
        self.own[replica] -= 1
        self.known[replica] = max(0, self.known[replica] - 1)


def simulate(scenario: Scenario) -> Outcome:
    rng = random.Random(scenario.seed)
    replicas = [f"{rng.getrandbits(40):010x}" for _ in range(scenario.replicas)]
    keys = [f"{rng.getrandbits(64):016x}" for _ in range(scenario.conversations)]
    routers = [Router() for _ in range(scenario.routers)]
    visited: list[list[str]] = [[] for _ in keys]
    load: Counter[str] = Counter()
    outcome, order = Outcome(), count()
    # (time, tie-breaker, conversation, router and replica that it leaves, or None where it arrives)
    events: list[tuple[float, int, int, tuple[Router, str] | None]] = []

    def later(delay: float, conversation: int, leaving: tuple[Router, str] | None, now: float) -> None:
        heapq.heappush(events, (now + delay, next(order), conversation, leaving))

    for conversation in range(scenario.conversations):
        later(rng.uniform(0, scenario.think_s + scenario.answer_s), conversation, None, 0.0)
    while events:
        now, _, conversation, leaving = heapq.heappop(events)
        if leaving is not None:
            router, name = leaving
            router.done(name)
            load[name] -= 1
            if len(visited[conversation]) < scenario.turns:
                later(rng.expovariate(1 / scenario.think_s) if scenario.think_s else 0.0, conversation, None, now)
            continue
        router = rng.choice(routers)
        outcome.requests += 1
        chosen = place(rank(keys[conversation], replicas), router.loads(replicas, scenario.limit), scenario.bound)
        if chosen is None or load[chosen] >= scenario.limit:
            outcome.refused += 1
            later(scenario.answer_s / 4, conversation, None, now)
            continue
        _note(outcome, visited[conversation], chosen, load, replicas, scenario.batch)
        load[chosen] += 1
        router.sent(chosen, load[chosen])
        slowdown = max(1.0, load[chosen] / scenario.batch)
        later(rng.gammavariate(4, scenario.answer_s / 4) * slowdown, conversation, (router, chosen), now)
    return outcome


def _note(
    outcome: Outcome, visited: list[str], chosen: str, load: Counter[str], replicas: list[str], batch: int
) -> None:
    if visited:
        outcome.later += 1
        outcome.same += visited[-1] == chosen
        outcome.held += chosen in visited
    visited.append(chosen)
    outcome.served[chosen] += 1
    outcome.waited += load[chosen] >= batch and min(load[name] for name in replicas) < batch
    mean = sum(load.values()) / len(replicas)
    if mean >= 1:
        outcome.peak = max(outcome.peak, load[chosen] / mean)

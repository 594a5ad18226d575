"""The request router in real Ray Serve: toy replicas that say who they are, and hold a call for as long as told."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from ray import cloudpickle, serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig

from deployments.affinity import rank
from deployments.running import running_replicas

DEADLINE_S = 60.0
SLOTS = 16
REPLICAS = 3
ROUTER = RequestRouterConfig(
    request_router_class="deployments.affinity_router:AffinityRouter",
    request_router_kwargs={"factor": 1.5, "idle": 8, "busy": SLOTS},
)


@dataclass(frozen=True)
class Call:
    affinity: str = ""
    rank: int = 0


class Board:
    """An actor that sees all toys from outside, where no limit of a deployment holds."""

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}
        self.held: Counter[str] = Counter()
        self.gate = asyncio.Event()

    async def join(self, name: str, pid: int) -> None:
        self.pids[name] = pid

    async def hold(self, name: str) -> None:
        self.held[name] += 1
        try:
            await self.gate.wait()
        finally:
            self.held[name] -= 1

    async def release(self) -> None:
        self.gate.set()
        self.gate = asyncio.Event()

    async def state(self) -> tuple[dict[str, int], Counter[str]]:
        return self.pids, self.held


class Toy:
    """Says who it is; `hold` answers after the board's next `release`."""

    def __init__(self, board: Any) -> None:
        self.name = str(serve.get_replica_context().replica_tag)
        self.board = board
        ray.get(board.join.remote(self.name, os.getpid()))

    async def who(self, call: Call) -> str:
        return self.name

    async def hold(self, call: Call) -> str:
        await self.board.hold.remote(self.name)
        return self.name


class Caller:
    """A replica with a handle of its own, and so with a router of its own."""

    def __init__(self, toy: Any) -> None:
        self.toy = toy

    async def ask(self, keys: list[str]) -> list[str]:
        return [await self.toy.who.remote(Call(key)) for key in keys]

    async def fan_out(self, keys: list[str]) -> list[str]:
        return list(await asyncio.gather(*(self.toy.who.remote(Call(key)) for key in keys)))


class Toys:
    """An application of three toys and one caller, seen from the test."""

    def __init__(self) -> None:
        options = {"num_cpus": 0}
        self.board = ray.remote(num_cpus=0, max_concurrency=1000)(Board).remote()
        toy = serve.deployment(
            name="Toy",
            num_replicas=REPLICAS,
            max_ongoing_requests=SLOTS,
            request_router_config=ROUTER,
            ray_actor_options=options,
            health_check_period_s=1,
            graceful_shutdown_timeout_s=1,
            graceful_shutdown_wait_loop_s=0.1,
        )(Toy).bind(self.board)
        caller = serve.deployment(name="Caller", ray_actor_options=options)(Caller).bind(toy)
        self.caller = serve.run(caller, name="affinity", route_prefix=None)
        self.handle = serve.get_deployment_handle("Toy", "affinity")

    async def ask(self, key: str, first: int = 0) -> str:
        return str(await self.handle.who.remote(Call(key, first)))

    async def ask_all(self, keys: list[str], width: int) -> list[str]:
        slots = asyncio.Semaphore(width)

        async def ask(key: str) -> str:
            async with slots:
                return await self.ask(key)

        return list(await asyncio.gather(*(ask(key) for key in keys)))

    @asynccontextmanager
    async def holding(self, key: str, number: int) -> AsyncIterator[Sequence[asyncio.Future[str]]]:
        """That many calls of one key, each held by the toy that got it until `release`."""
        calls = [asyncio.ensure_future(_awaited(self.handle.hold.remote(Call(key)))) for _ in range(number)]
        try:
            yield calls
        finally:
            while not all(call.done() for call in calls):
                await self.release()
                await asyncio.wait(calls, timeout=0.02)
            await self.idle()

    async def idle(self) -> None:
        """Until this process's router counts nothing as under way: it learns of ends a little after the callers."""
        router = self.handle._router._asyncio_router.request_router
        deadline = time.monotonic() + DEADLINE_S
        while router._under_way:
            assert time.monotonic() < deadline, router._under_way
            await asyncio.sleep(0.02)

    async def pids(self) -> dict[str, int]:
        pids, _ = await self.board.state.remote()
        return dict(pids)

    async def held(self, until: Callable[[Counter[str]], bool]) -> Counter[str]:
        """Held calls by replica, once they are as they should be."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            _, held = await self.board.state.remote()
            if until(held):
                return Counter(held)
            assert time.monotonic() < deadline, held
            await asyncio.sleep(0.02)

    async def release(self) -> None:
        await self.board.release.remote()


async def _awaited(response: Any) -> str:
    return str(await response)


@pytest.fixture(scope="module")
def toys() -> Iterator[Toys]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ours = not ray.is_initialized()
    if ours:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        serve.start(proxy_location="Disabled")
    yield Toys()
    serve.delete("affinity")
    if ours:
        serve.shutdown()
        ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


async def test_processes_that_share_nothing_agree_on_every_key(toys: Toys) -> None:
    keys = [f"conversation {number}" for number in range(30)]
    names = list(await toys.pids())
    expected = [rank(key, names)[0] for key in keys]
    assert len(names) == REPLICAS
    assert [await toys.ask(key) for key in keys] == expected
    assert await toys.caller.ask.remote(keys) == expected


async def test_a_handle_knows_how_many_replicas_it_reaches(toys: Toys) -> None:
    assert running_replicas(toys.handle) == REPLICAS


async def test_a_session_id_of_the_handle_is_a_key_too(toys: Toys) -> None:
    favourite = rank("mine", await toys.pids())[0]
    handle = toys.handle.options(method_name="who", session_id="mine")
    assert {await handle.remote(Call()) for _ in range(4)} == {favourite}


async def test_a_caller_that_was_sent_away_reaches_the_next_in_rank(toys: Toys) -> None:
    assert [await toys.ask("key", first) for first in range(REPLICAS)] == rank("key", await toys.pids())


async def test_a_favourite_that_cannot_be_reached_is_passed_over_for_a_moment(toys: Toys) -> None:
    favourite = await toys.ask("unreachable")
    router = toys.handle._router._asyncio_router.request_router
    (replica_id,) = (each for each in router.curr_replicas if each.unique_id == favourite)
    router.on_replica_actor_unavailable(replica_id)
    assert await toys.ask("unreachable") == await toys.ask("unreachable", 1) != favourite
    async with asyncio.timeout(DEADLINE_S):
        while await toys.ask("unreachable") != favourite:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_later_turns_of_200_conversations_hit_at_moderate_load(toys: Toys) -> None:
    keys = [f"conversation {number}" for number in range(200)]
    before = await toys.ask_all(keys, width=4)
    turns = [await toys.ask_all(keys, width=4) for _ in range(3)]
    hits = sum(now == then for turn in turns for now, then in zip(turn, before, strict=True)) / (3 * len(keys))
    print(f"{hits:.1%} of later turns hit")
    assert hits >= 0.9


async def test_at_overload_nobody_waits_for_the_favourite(toys: Toys) -> None:
    async with toys.holding("everybody's", REPLICAS * SLOTS):
        held = await toys.held(lambda held: held.total() == REPLICAS * SLOTS)
        assert set(held.values()) == {SLOTS}


async def test_a_burst_of_one_key_is_bounded_on_its_favourite(toys: Toys) -> None:
    favourite = rank("everybody's", await toys.pids())[0]
    await toys.idle()
    async with toys.holding("everybody's", 24):
        held = await toys.held(lambda held: held.total() == 24)
        assert 8 < held[favourite] <= 12  # 1.5 times 24 / 3


async def test_calls_beyond_every_limit_go_on_as_soon_as_there_is_room(toys: Toys) -> None:
    async with toys.holding("everybody's", REPLICAS * SLOTS + 5) as calls:
        await toys.held(lambda held: held.total() == REPLICAS * SLOTS)
        calls[-1].cancel()
        await toys.release()
        await toys.held(lambda held: held.total() == 4)
    assert sum(not call.cancelled() and call.exception() is None for call in calls) == REPLICAS * SLOTS + 4


@pytest.mark.parametrize("key", ["one", ""])
async def test_concurrent_calls_of_one_request_are_all_served(toys: Toys, key: str) -> None:
    """With a request router that leaves them to the base class, one of them is served and the others never."""
    async with asyncio.timeout(DEADLINE_S):
        answers = await toys.caller.fan_out.remote([key] * 64)
    assert len(answers) == 64
    assert set(answers) == set(await toys.pids())


async def test_a_killed_replica_moves_only_its_own_conversations_until_the_new_one_draws_its_share(toys: Toys) -> None:
    keys = [f"conversation {number}" for number in range(120)]
    before = {key: await toys.ask(key) for key in keys}
    gone = before[keys[0]]
    others = set(before.values()) - {gone}
    os.kill((await toys.pids())[gone], signal.SIGKILL)
    after = {key: await _survived(toys, key) for key in keys}
    assert {key for key in keys if after[key] != before[key] and after[key] in others} <= {
        key for key in keys if before[key] == gone
    }
    settled = await _settled(toys, keys, others)
    moved = [key for key in keys if before[key] in others and settled[key] != before[key]]
    assert not {settled[key] for key in moved} & (others | {gone})
    assert len(moved) / len(keys) <= 1 / REPLICAS + 0.05


async def _survived(toys: Toys, key: str) -> str:
    """As the failover does it: a call that dies with its replica is made again."""
    for _ in range(20):
        try:
            return await toys.ask(key)
        except RayActorError:
            continue
    raise AssertionError(f"{key} found no replica")


async def _settled(toys: Toys, keys: list[str], others: set[str]) -> dict[str, str]:
    """Who answers, once a new replica does."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        answers = {key: await _survived(toys, key) for key in keys}
        if len(set(answers.values())) == REPLICAS and others < set(answers.values()):
            return {key: await toys.ask(key) for key in keys}
        assert time.monotonic() < deadline, Counter(answers.values())

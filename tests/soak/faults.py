"""What is done to an application while it serves: one fault after the other, each a real one."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx

from tests.faults.cluster import CPUS, Deployed, controller_pid, core_of, kill
from tests.faults.traffic import client
from tests.stack.helpers import about, picture

LEAVING = 8


class Faults:
    """Faults in turn, at least one replica of a tier left alive each time.

    Args:
        args, deployments: What the application was deployed with, for updates of it.
        ingress: Whether ingresses are killed too: what they are forwarding breaks, and is asked again.
    """

    def __init__(
        self, app: Deployed, args: Mapping[str, Any], deployments: Mapping[str, Mapping[str, Any]], seed: int = 0
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._app = app
        self._args = args
        self._deployments = deployments
        self._rng = random.Random(seed)
        self._updates = 0
        self._kinds: dict[str, Callable[[], bool]] = {
            "render replica killed": lambda: self._kill("RenderReplica"),
            "engine core killed": self._kill_core,
            "clients leave": self._leave,
            "engine replica killed": lambda: self._kill("EngineReplica"),
            "router killed": lambda: self._kill("Router"),
            "tiers shrink": lambda: self._scale(1),
            "tiers grow": lambda: self._scale(2),
            "controller killed": lambda: self._kill_pid(controller_pid()),
            "rolling update": self._update,
            "proxy killed": self._kill_proxy,
            "node lost": self._lose_node,
        }
        self._turn = itertools.cycle(self._kinds)

    def next(self) -> str:
        """Do the next one that is possible now; its name."""
        for name in itertools.islice(self._turn, len(self._kinds)):
            if self._kinds[name]():
                self.counts[name] += 1
                return name
        return "none is possible"

    def restore(self) -> None:
        """Two replicas a tier again, all running."""
        self._scale(2)
        self._app.wait_until_running()
        self._app.wait_for_replicas(**dict.fromkeys(self._deployments, 2))

    def _kill(self, deployment: str) -> bool:
        replicas = self._app.replicas(deployment)
        return len(replicas) > 1 and self._kill_pid(self._rng.choice(replicas).pid)

    def _kill_core(self) -> bool:
        for replica in self._app.replicas("EngineReplica"):
            with suppress(LookupError):
                return self._kill_pid(core_of(replica).pid)
        return False

    def _kill_proxy(self) -> bool:
        with suppress(LookupError):
            return self._kill_pid(self._app.cluster.proxy_pid())
        return False

    def _lose_node(self) -> bool:
        """A node is gone at once with all that ran there, and another is added. Where each tier has a replica left."""
        nodes = self._app.cluster.nodes
        for node in nodes.worker_nodes:
            running = (self._app.replicas(deployment) for deployment in self._deployments)
            if all(any(replica.node != node.node_id for replica in tier) for tier in running):
                nodes.remove_node(node, allow_graceful=False)
                nodes.add_node(num_cpus=CPUS)
                return True
        return False

    def _kill_pid(self, pid: int) -> bool:
        kill(pid)
        return True

    def _scale(self, number: int) -> bool:
        numbers = {name: {**options, "num_replicas": number} for name, options in self._deployments.items()}
        self._app.update(self._updated_args(), **numbers)
        return True

    def _update(self) -> bool:
        self._updates += 1
        return self._scale(2)

    def _updated_args(self) -> dict[str, Any]:
        """The arguments with one that changes nothing but makes Serve replace every replica."""
        router = {**self._args.get("router", {}), "render_attempts": 3 + self._updates % 2}
        return {**self._args, "router": router}

    def _leave(self) -> bool:
        """Clients that begin endless streams and go."""

        async def one(http: httpx.AsyncClient, number: int) -> None:
            body = {"messages": about(picture(number)), "max_tokens": 3000, "ignore_eos": True, "stream": True}
            with suppress(httpx.TransportError):
                async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                    async for _ in response.aiter_lines():
                        return

        async def all_of_them() -> None:
            async with client(self._app.url) as http:
                await asyncio.gather(*(one(http, number) for number in range(LEAVING)))

        asyncio.run(all_of_them())
        return True

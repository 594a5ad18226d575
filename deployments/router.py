"""The router: every route and every handle method, and the choice of the tier that serves it."""

from __future__ import annotations

import time
from typing import Any

from deployments.backends import HandleBackend
from deployments.config import GreenroomConfig
from deployments.front import Front
from deployments.operations import Operations
from deployments.peers import Peers
from deployments.records import Record
from deployments.rehearsal import rehearse
from deployments.tier import Tier


class Router(Operations):
    """The ingress of the whole application.

    Args:
        render, engine: Handles of the tiers' deployments; None where the configuration has none.
    """

    async def __init__(self, config: GreenroomConfig, render: Any = None, engine: Any = None) -> None:  # type: ignore[misc]  # Serve awaits it
        record = Record("router")
        handles = {Tier.RENDER: render, Tier.ENGINE: engine}
        peers = Peers()
        present = {tier: handle for tier, handle in handles.items() if handle is not None}
        backend = HandleBackend(present, config.router, peers.share)
        begun = time.perf_counter()
        await backend.warm()
        record.add_steps({"tiers": time.perf_counter() - begun})
        super().__init__(Front(config, backend), record, peers)
        await rehearse(self)
        record.warm()
        record.tell(self.report)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the work that this router has for the tiers, wherever it is served."""
        return self.front.backend.figures()

"""The render tier: warm processors, no engine, no model weights."""

from __future__ import annotations

from typing import Any

from ray import serve

from deployments.autoscaling import RENDER_SECONDS
from deployments.backends import LocalBackend
from deployments.borrowing.helpers import Helpers
from deployments.borrowing.render_tier import RenderTier
from deployments.borrowing.rule import BorrowRule
from deployments.calls import BorrowCall, ReplicaReport
from deployments.config import GreenroomConfig, RenderTierConfig
from deployments.front import Front
from deployments.operations import Operations
from deployments.peers import Peers
from deployments.records import Record
from deployments.rehearsal import rehearse, rehearse_rendering
from deployments.rendering import ItemSources, RenderOnly, warm_renderer
from renderer.caches import ProcessedItem
from renderer.errors import ConfigError


class RenderReplica(RenderOnly):
    """One render replica. It is warm before anybody can reach it: Serve waits for the constructor.

    Raises:
        WarmupError: A warm-up step failed. Serve shows the reason in the deployment's status.
    """

    async def __init__(self, config: RenderTierConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        record = Record("render")
        self._helpers = fan_out(config)
        sources = ItemSources(readonly=self._helpers)
        super().__init__(await warm_renderer(config.renderer, record, sources), record)
        await rehearse_rendering(self)
        record.warm()
        self._helpers.open()
        record.tell(self.report)

    async def report(self) -> ReplicaReport:
        """This replica's record and its caches' statistics."""
        under_way = {"render_seconds": self.waiting.level}
        return self.record.report(
            self.renderer.max_model_len, self.caches, under_way=under_way, items=self._helpers.counts
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the work that waits here."""
        return {RENDER_SECONDS: self.waiting.mean()}

    async def check_health(self) -> None:
        """Nothing here can fail without the process: that it answers is the check."""


class RenderIngress(Operations):
    """A render replica as its own HTTP edge: the render-only routes without a hop."""

    async def __init__(self, config: GreenroomConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        if config.render is None:
            raise ConfigError("an application that only renders needs a render tier")
        record = Record("render")
        self._helpers = fan_out(config.render)
        sources = ItemSources(readonly=self._helpers)
        self.replica = RenderOnly(await warm_renderer(config.render.renderer, record, sources), record)
        super().__init__(Front(config, LocalBackend(self.replica)), record, Peers())
        await rehearse(self)
        await self.replica.clear_mm_cache()
        record.warm()
        self._helpers.open()
        record.tell(self.report)

    async def report(self) -> ReplicaReport:
        """This replica's record and its caches' statistics."""
        under_way = {"render_seconds": self.replica.waiting.level, **self.front.under_way()}
        return self.record.report(
            self.replica.renderer.max_model_len, self.replica.caches, under_way=under_way, items=self._helpers.counts
        )

    async def process_item(self, call: BorrowCall) -> ProcessedItem:
        """One item for another replica of this tier."""
        return await self.replica.process_item(call)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the work that waits here."""
        return {RENDER_SECONDS: self.replica.waiting.mean()}

    def __del__(self) -> None:
        # Called by Serve on the replica's event loop, once the last request has ended.
        if "replica" in vars(self):
            self.replica.close()


def fan_out(config: RenderTierConfig) -> Helpers:
    """The items of a request that has many, spread over the tier that this replica is one of."""
    tier = RenderTier(_own_tier, skip_mm_cache=True, itself=True)
    rule = BorrowRule("auto", config.helpers.min_pixels, config.fan_out_items)
    copies = config.renderer.processor_cache_bytes > 0
    return Helpers(tier, rule, config.renderer.media_threads, config.helpers, copies=copies)


def _own_tier() -> Any:
    context = serve.get_replica_context()
    return serve.get_deployment_handle(context.deployment, context.app_name)

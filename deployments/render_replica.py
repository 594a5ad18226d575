"""The render tier: warm processors, no engine, no model weights."""

from __future__ import annotations

from deployments.autoscaling import RENDER_SECONDS
from deployments.backends import LocalBackend
from deployments.calls import ReplicaReport
from deployments.config import GreenroomConfig, RenderTierConfig
from deployments.front import Front
from deployments.operations import Operations
from deployments.records import Record
from deployments.rendering import RenderOnly, warm_renderer
from renderer.errors import ConfigError


class RenderReplica(RenderOnly):
    """One render replica. It is warm before anybody can reach it: Serve waits for the constructor.

    Raises:
        WarmupError: A warm-up step failed. Serve shows the reason in the deployment's status.
    """

    async def __init__(self, config: RenderTierConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        record = Record("render")
        super().__init__(await warm_renderer(config.renderer, record), record)
        record.warm()
        record.tell(self.report)

    async def report(self) -> ReplicaReport:
        """This replica's record and its caches' statistics."""
        under_way = {"render_seconds": self.waiting.level}
        return self.record.report(self.renderer.max_model_len, self.caches, under_way=under_way)

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
        self.replica = RenderOnly(await warm_renderer(config.render.renderer, record), record)
        super().__init__(Front(config, LocalBackend(self.replica)), record)
        record.warm()
        record.tell(self.report)

    async def report(self) -> ReplicaReport:
        """This replica's record and its caches' statistics."""
        under_way = {"render_seconds": self.replica.waiting.level, **self.front.under_way()}
        return self.record.report(self.replica.renderer.max_model_len, self.replica.caches, under_way=under_way)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the work that waits here."""
        return {RENDER_SECONDS: self.replica.waiting.mean()}

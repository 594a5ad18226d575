"""An application whose replicas carry as much work as they are told."""

from __future__ import annotations

import warnings
from typing import Any

from ray import serve

from deployments.autoscaling import RENDER_SECONDS, Gauge

QUICK = {"upscale_delay_s": 0.3, "downscale_delay_s": 0.6, "look_back_period_s": 0.8, "metrics_interval_s": 0.2}


class Loaded:
    """Carries `load` until told otherwise."""

    def __init__(self) -> None:
        self.gauge = Gauge()

    async def load(self, seconds: float) -> None:
        self.gauge.add(seconds - self.gauge.level)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {RENDER_SECONDS: self.gauge.mean()}


class Worker(Loaded):
    pass


class Front(Loaded):
    def __init__(self, worker: Any) -> None:
        super().__init__()
        self.worker = worker

    async def load_workers(self, seconds: float) -> None:
        await self.worker.broadcast("load", seconds).results_async()


def deployment(kind: type, low: int, high: int, **scaling: Any) -> Any:
    with warnings.catch_warnings():
        # Ray 2.60 warns about `metrics_interval_s` in favour of variables that it does not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        return serve.deployment(
            name=kind.__name__,
            ray_actor_options={"num_cpus": 0},
            autoscaling_config={"min_replicas": low, "max_replicas": high, **QUICK, **scaling},
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=1,
        )(kind)


application = deployment(Front, 1, 1).bind(deployment(Worker, 0, 4).bind())

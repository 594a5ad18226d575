"""The composition root: what is deployed, from the configuration alone.

    build:         client -> Router -> RenderReplica (render-only requests)
                                '----> EngineReplica (generation)
    build_render:  client -> RenderIngress

Serve reads the annotation of a builder's parameter to validate `args`, so annotations here are not postponed.

Everything about a deployment that is not a matter of size is set here. Sizes (`num_replicas`, `autoscaling_config`,
`ray_actor_options`) have defaults here and belong into the `deployments` section of the config file, which wins; Serve
replaces such an option there as a whole.
"""

from typing import Any

from ray import serve

from deployments.config import GreenroomConfig, ReplicaConfig
from deployments.engine_replica import EngineReplica
from deployments.render_replica import RenderIngress, RenderReplica
from deployments.router import Router

# Serve's own default drops a replica only ten minutes after the load has gone.
ROUTER_SCALING = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 200, "downscale_delay_s": 300}
RENDER_SCALING = {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 4, "upscale_delay_s": 10}
ENGINE_SCALING = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 24, "upscale_delay_s": 30}


def build(config: GreenroomConfig) -> Any:
    """The whole application: what `serve_config.yaml` and `serve run deployments.app:build model=PATH` deploy."""
    render = engine = None
    if config.render is not None:
        render = _deployment(RenderReplica, config.render, RENDER_SCALING).bind(config.render)
    if config.engine is not None:
        engine = _deployment(EngineReplica, config.engine, ENGINE_SCALING).bind(config.engine)
    return _ingress(Router, config.router, ROUTER_SCALING).bind(config, render, engine)


def build_render(config: GreenroomConfig) -> Any:
    """The render tier alone, its replicas as the ingress: no hop for gateways that only render."""
    tier = config.render if config.render is not None else config.router
    return _ingress(RenderIngress, tier, RENDER_SCALING).bind(config)


def _ingress(kind: type, config: ReplicaConfig, scaling: dict[str, Any]) -> Any:
    # Serve makes a subclass, named after the class: the routes are the instance's own.
    return _deployment(serve.ingress()(kind), config, scaling, name=kind.__name__)


def _deployment(kind: type, config: ReplicaConfig, scaling: dict[str, Any], name: str | None = None) -> Any:
    return serve.deployment(
        kind,
        name=name or kind.__name__,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        autoscaling_config=scaling,
        max_ongoing_requests=config.max_ongoing_requests,
        # A rolling update starts the replacement before it stops the old replica: without it, one replica is a gap.
        max_surge_percent=100,
        max_constructor_retry_count=config.start_attempts,
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=10,
    )

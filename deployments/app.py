"""The composition root: what is deployed, from the configuration alone.

    build:         client -> Router -> RenderReplica (render-only requests)
                                '----> EngineReplica (generation) --> RenderReplica (borrowed items)
    build_render:  client -> RenderIngress

Serve reads the annotation of a builder's parameter to validate `args`, so annotations here are not postponed.

Everything about a deployment that is not a matter of size is set here. Sizes (`num_replicas`, `autoscaling_config`,
`ray_actor_options`) have defaults here and belong into the `deployments` section of the config file, which wins; Serve
replaces such an option there as a whole.
"""

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingPolicy, RequestRouterConfig

from deployments.autoscaling import ENGINE_PROMPT_TOKENS, ENGINE_SEQUENCES, RENDER_SECONDS
from deployments.config import EngineTierConfig, GreenroomConfig, RenderTierConfig, ReplicaConfig
from deployments.engine_replica import EngineReplica
from deployments.render_replica import RenderIngress, RenderReplica
from deployments.router import Router

# Serve's own default drops a replica only ten minutes after the load has gone.
ROUTER_SCALING = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 200, "downscale_delay_s": 300}
RENDER_SCALING = {"min_replicas": 1, "max_replicas": 8, "upscale_delay_s": 10, "look_back_period_s": 15}
ENGINE_SCALING = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 30}
# What a render replica should have waiting, in seconds for each of its threads: how long a new request waits.
RENDER_WAIT_S = 0.25
# The part of an engine's batch that is in use before another engine starts, and the tokens of prompts that wait there.
ENGINE_FILL = 0.75
ENGINE_WAITING_TOKENS = 8192.0
# Calls that a replica takes beside its requests: reports and orders must get through where requests are many.
CONTROL_SLOTS = 16


def build(config: GreenroomConfig) -> Any:
    """The whole application: what `serve_config.yaml` and `serve run deployments.app:build model=PATH` deploy."""
    render = engine = None
    if config.render is not None:
        render = _deployment(RenderReplica, config.render, _render_scaling(config.render)).bind(config.render)
    if config.engine is not None:
        scaling = ENGINE_SCALING | _policy(engine_carries(config.engine))
        helpers = None if config.engine.borrow == "never" else render
        deployment = _deployment(EngineReplica, config.engine, scaling, router=_affinity(config.engine))
        engine = deployment.bind(config.engine, helpers)
    return _ingress(Router, config.router, ROUTER_SCALING).bind(config, render, engine)


def build_render(config: GreenroomConfig) -> Any:
    """The render tier alone, its replicas as the ingress: no hop for gateways that only render."""
    tier = config.render if config.render is not None else config.router
    scaling = RENDER_SCALING if config.render is None else _render_scaling(config.render)
    return _ingress(RenderIngress, tier, scaling).bind(config)


def render_carries(config: RenderTierConfig) -> dict[str, float]:
    """What one render replica should have under way: see `autoscaling.replicas_for`."""
    return {RENDER_SECONDS: RENDER_WAIT_S * config.renderer.media_threads}


def engine_carries(config: EngineTierConfig) -> dict[str, float]:
    """What one engine replica should have under way."""
    return {
        ENGINE_SEQUENCES: ENGINE_FILL * config.engine.max_num_seqs,
        ENGINE_PROMPT_TOKENS: ENGINE_WAITING_TOKENS,
    }


def _render_scaling(config: RenderTierConfig) -> dict[str, Any]:
    return RENDER_SCALING | _policy(render_carries(config))


def _policy(carried: dict[str, float]) -> dict[str, Any]:
    name = "deployments.autoscaling:TierPolicy"
    return {"policy": AutoscalingPolicy(policy_function=name, policy_kwargs={"carried": carried})}


def _affinity(config: EngineTierConfig) -> RequestRouterConfig:
    return RequestRouterConfig(
        request_router_class="deployments.affinity_router:AffinityRouter",
        request_router_kwargs={
            **config.affinity.model_dump(),
            "busy": config.engine.max_num_seqs,
            "reserved": CONTROL_SLOTS,
        },
    )


def _ingress(kind: type, config: ReplicaConfig, scaling: dict[str, Any]) -> Any:
    # Serve makes a subclass, named after the class: the routes are the instance's own.
    return _deployment(serve.ingress()(kind), config, scaling, name=kind.__name__)


def _deployment(
    kind: type,
    config: ReplicaConfig,
    scaling: dict[str, Any],
    name: str | None = None,
    router: RequestRouterConfig | None = None,
) -> Any:
    return serve.deployment(
        kind,
        name=name or kind.__name__,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        autoscaling_config=scaling,
        max_ongoing_requests=config.max_ongoing_requests + CONTROL_SLOTS,
        # A rolling update starts the replacement before it stops the old replica: without it, one replica is a gap.
        max_surge_percent=100,
        max_constructor_retry_count=config.start_attempts,
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=10,
        request_router_config=router or RequestRouterConfig(),
    )

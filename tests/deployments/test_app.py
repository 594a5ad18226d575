"""What is deployed, without deploying it."""

from typing import Any

import pytest
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from deployments.app import build, build_render
from deployments.config import GreenroomConfig


def deployments(app: Any) -> dict[str, Any]:
    """Every deployment of a bound application, by name."""
    found = {app._bound_deployment.name: app._bound_deployment}
    for argument in app._bound_deployment.init_args:
        if hasattr(argument, "_bound_deployment"):
            found |= deployments(argument)
    return found


@pytest.mark.parametrize("builder", [build, build_render])
def test_serve_validates_the_arguments_of_a_builder(builder: Any) -> None:
    app = call_user_app_builder_with_args_if_necessary(builder, {"model": "demo/model", "max_model_len": "2048"})
    config = next(argument for argument in app._bound_deployment.init_args if isinstance(argument, GreenroomConfig))
    assert config.max_model_len == 2048
    with pytest.raises(ValueError, match="modle"):
        call_user_app_builder_with_args_if_necessary(builder, {"modle": "demo/model"})


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ({}, {"Router", "RenderReplica", "EngineReplica"}),
        ({"render": None}, {"Router", "EngineReplica"}),
        ({"engine": None}, {"Router", "RenderReplica"}),
    ],
)
def test_the_graph_has_the_tiers_of_the_configuration(args: dict[str, Any], names: set[str]) -> None:
    assert set(deployments(build(GreenroomConfig.model_validate({"model": "demo/model", **args})))) == names


def test_the_render_tier_alone_is_its_own_ingress() -> None:
    assert set(deployments(build_render(GreenroomConfig.model_validate({"model": "demo/model"})))) == {"RenderIngress"}


def test_one_replica_of_any_tier_updates_without_a_gap_and_gives_up_a_start_that_fails() -> None:
    for deployment in deployments(build(GreenroomConfig.model_validate({"model": "demo/model"}))).values():
        config = deployment._deployment_config
        assert config.max_surge_percent == 100
        assert config.max_constructor_retry_count == 3
        assert config.autoscaling_config.min_replicas == 1


def test_the_whole_application_fits_twice_on_two_cores() -> None:
    graph = deployments(build(GreenroomConfig.model_validate({"model": "demo/model"})))
    cores = sum(deployment.ray_actor_options["num_cpus"] for deployment in graph.values())
    assert 2 * cores <= 2

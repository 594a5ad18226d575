import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import app
from deployments.config import PROJECT, GreenroomConfig
from deployments.launch.config_file import BUILDERS, SCALED_BY_WORK, SERVE_CONFIG, load_config
from deployments.launch.ray_cluster import EVERYWHERE, HAPROXY
from renderer.errors import ConfigError
from tests.deployments.test_app import deployments

DOCS = PROJECT / "docs"
SHIPPED = sorted([*DOCS.glob("examples/*.yaml"), DOCS / "cluster" / "serve_config.yaml"])
POLICY = "deployments.autoscaling:ApplicationPolicy"


def write(tmp_path: Path, config: object) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def minimal(builder: str = "build", **changes: object) -> dict[str, object]:
    application: dict[str, object] = {"import_path": f"deployments.app:{builder}", "args": {"model": "demo/model"}}
    return {"applications": [application | changes]}


def deployed(**deployment: object) -> dict[str, object]:
    return minimal(deployments=[{"name": "Router", **deployment}])


def scaled(tiers: object) -> dict[str, object]:
    return minimal(autoscaling_policy={"policy_function": POLICY, "policy_kwargs": {"tiers": tiers}})


def built(import_path: str, args: dict[str, Any]) -> dict[str, Any]:
    """Every deployment that a builder makes, by name."""
    return deployments(getattr(app, import_path.partition(":")[2])(GreenroomConfig.model_validate(args)))


def test_the_shipped_config_file_is_valid() -> None:
    assert load_config(SERVE_CONFIG, None, None)["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize("path", [SERVE_CONFIG, *SHIPPED], ids=lambda path: path.name)
def test_every_serve_config_that_is_shipped_is_valid_and_builds_its_applications(path: Path) -> None:
    config = load_config(path, None, None)
    assert config["logging_config"]["encoding"] == "JSON"
    for application in config["applications"]:
        graph = built(application["import_path"], application["args"])
        assert {deployment["name"] for deployment in application.get("deployments", [])} <= graph.keys()


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("without", [None, "render", "engine"])
def test_what_is_known_of_the_builders_is_what_they_build(builder: str, without: str | None) -> None:
    args = {"model": "demo/model"} | ({} if without is None else {without: None})
    graph = built(f"deployments.app:{builder}", args)
    assert BUILDERS[builder](GreenroomConfig.model_validate(args)) == graph.keys()
    if (builder, without) != ("build_render", "render"):
        own = {name for name, each in graph.items() if each._deployment_config.autoscaling_config.policy.policy_kwargs}
        assert own == graph.keys() & SCALED_BY_WORK


def test_the_docs_show_every_backend_and_either_application_and_both_in_one_file() -> None:
    paths = {
        path.stem: [each["import_path"] for each in yaml.safe_load(path.read_text())["applications"]]
        for path in SHIPPED
    }
    assert {"vllm", "remote"} <= paths.keys()
    assert paths["render"] == ["deployments.app:build_render"]
    assert paths["both"] == ["deployments.app:build", "deployments.app:build_render"]


def test_the_manifest_for_kubernetes_holds_the_clusters_serve_config_and_asks_for_a_token() -> None:
    spec = yaml.safe_load((DOCS / "cluster" / "rayservice.yaml").read_text())["spec"]
    assert yaml.safe_load(spec["serveConfigV2"]) == yaml.safe_load((DOCS / "cluster" / "serve_config.yaml").read_text())
    assert spec["rayClusterConfig"]["authOptions"]["mode"] == "token"
    groups = [spec["rayClusterConfig"]["headGroupSpec"], *spec["rayClusterConfig"]["workerGroupSpecs"]]
    for group in groups:
        for container in group["template"]["spec"]["containers"]:
            told = {entry["name"]: entry.get("value") for entry in container["env"]}
            asked_for = "RAY_AUTH_MODE"  # the operator's own to set
            assert told.items() >= (EVERYWHERE | HAPROXY).items() - {(asked_for, EVERYWHERE[asked_for])}


def test_the_scripts_for_machines_tell_ray_what_make_serve_tells_it() -> None:
    script = (DOCS / "cluster" / "environment.sh").read_text()
    exported = dict(re.findall(r"\b([A-Za-z_]+)=([^ \n]+)", script))
    assert exported.items() >= (EVERYWHERE | HAPROXY).items()


def test_the_command_line_overrides_model_and_port(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, minimal()), "other", 8123)
    assert config["applications"][0]["args"]["model"] == "other"
    assert config["http_options"]["port"] == 8123


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**minimal(), "application": []}, "application"),
        (deployed(num_replica=1), "num_replica"),
        (deployed(autoscaling_config={"max_replica": 2}), "max_replica"),
        (deployed(name="Routre"), "no deployment Routre; there are EngineReplica, RenderReplica, Router"),
        (minimal("build_render", deployments=[{"name": "Router"}]), "there are RenderIngress"),
        (minimal("biuld"), "biuld"),
        (minimal(args={"modle": "demo/model"}), "modle"),
        (minimal(args={"model": "demo/model", "router": {"max_body_bytes": "many"}}), "max_body_bytes"),
        (scaled({"Render": {"render_seconds": 1}}), "no deployment Render"),
        (scaled({"RenderReplica": {"seconds": 1}}), "nobody tells seconds"),
        (
            minimal(deployments=[{"name": "RenderReplica", "autoscaling_config": {"max_replicas": 2}}]),
            "would scale on requests",
        ),
        (scaled({"EngineReplica": {"engine_sequences": 1}}), "RenderReplica would scale on requests"),
    ],
)
def test_what_serve_would_ignore_or_find_too_late_is_refused_by_name(
    tmp_path: Path, config: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(write(tmp_path, config), None, None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml", None, None)

"""A Serve config file, read and checked whole: Serve itself ignores the keys that it does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from deployments.autoscaling import ENGINE_PROMPT_TOKENS, ENGINE_SEQUENCES, RENDER_SECONDS
from deployments.config import PROJECT, GreenroomConfig
from renderer.errors import ConfigError

SERVE_CONFIG = PROJECT / "serve_config.yaml"
# What is known of `deployments.app` here, where importing it would load every model library.
BUILDERS: Mapping[str, Callable[[GreenroomConfig], set[str]]] = {
    "build": lambda config: {
        "Router",
        *(["RenderReplica"] if config.render is not None else []),
        *(["EngineReplica"] if config.engine is not None else []),
    },
    "build_render": lambda config: {"RenderIngress"},
}
SCALED_BY_WORK = frozenset({"RenderReplica", "EngineReplica", "RenderIngress"})
FIGURES = frozenset({RENDER_SECONDS, ENGINE_SEQUENCES, ENGINE_PROMPT_TOKENS})


def load_config(path: Path, model: str | None, port: int | None) -> dict[str, Any]:
    """Read a Serve config file, put the command line's choices in, and refuse what Serve or Greenroom would not know.

    Raises:
        ConfigError: The file is missing, is no YAML, or has keys or values that nobody understands.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if model is not None:
        for application in config.get("applications", []):
            application.setdefault("args", {})["model"] = model
    if port is not None:
        config.setdefault("http_options", {})["port"] = port
    check_config(config)
    return dict(config)


def check_config(config: dict[str, Any]) -> None:
    """Check a whole Serve config: Serve's schema, no key that it would ignore, and every application of Greenroom's.

    Raises:
        ConfigError: Names the keys or values at fault.
    """
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(config)
        unknown = list(unknown_keys(ServeDeploySchema, config))
        if unknown:
            raise ConfigError(f"unknown keys: {', '.join(unknown)}")
        for application in config["applications"]:
            if application["import_path"].startswith("deployments.app:"):
                check_application(application)
    except ValidationError as error:
        raise ConfigError(str(error)) from error


def check_application(application: Mapping[str, Any]) -> None:
    """Compare what the file says of an application's deployments with what there will be."""
    builder = application["import_path"].partition(":")[2]
    if builder not in BUILDERS:
        raise ConfigError(f"import_path: deployments.app has no {builder!r}; it has {', '.join(BUILDERS)}")
    names = BUILDERS[builder](GreenroomConfig.model_validate(application.get("args", {})))
    sized = {deployment["name"]: deployment for deployment in application.get("deployments", [])}
    policy = (application.get("autoscaling_policy") or {}).get("policy_kwargs", {})
    scaled: Mapping[str, Mapping[str, float]] = policy.get("tiers", {})
    _refuse("deployments: no deployment", sized.keys() - names, names)
    _refuse("autoscaling_policy: no deployment", scaled.keys() - names, names)
    _refuse("autoscaling_policy: nobody tells", {name for each in scaled.values() for name in each} - FIGURES, FIGURES)
    for name in (names & SCALED_BY_WORK) - scaled.keys():
        scaling = sized.get(name, {}).get("autoscaling_config")
        if policy or (isinstance(scaling, Mapping) and "policy" not in scaling):
            raise ConfigError(
                f"{name} would scale on requests: an autoscaling_policy, or an autoscaling_config under deployments, "
                f"takes the place of its own policy. Name {name} under autoscaling_policy.policy_kwargs.tiers."
            )


def _refuse(what: str, strange: Iterable[str], known: Iterable[str]) -> None:
    names = sorted(strange)
    if names:
        raise ConfigError(f"{what} {', '.join(names)}; there are {', '.join(sorted(known))}")


def unknown_keys(schema: type[BaseModel], data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of the keys that the schema does not have, at every level that is a model or a list of models."""
    fields = {field.alias or name: field for name, field in schema.model_fields.items()}
    for key, value in data.items():
        if key not in fields:
            yield f"{prefix}{key}"
            continue
        model = _model_of(fields[key].annotation)
        if model is None:
            continue
        entries = value if isinstance(value, list) else [value]
        for position, entry in enumerate(entries):
            if isinstance(entry, Mapping):
                yield from unknown_keys(
                    model, entry, f"{prefix}{key}[{position}]." if len(entries) > 1 else f"{prefix}{key}."
                )


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model within an annotation such as `Optional[Model]` or `List[Model]`; None for anything else."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        model = _model_of(argument)
        if model is not None:
            return model
    return None

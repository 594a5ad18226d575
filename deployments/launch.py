"""`make serve`: the application of a Serve config file, on this machine, in the foreground until Ctrl-C.

Serve itself ignores keys that it does not know; here a configuration is checked whole before anything starts.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from renderer.errors import ConfigError

SERVE_CONFIG = Path(__file__).parent.parent / "serve_config.yaml"
TOKEN_PATH = Path("~/.ray/auth_token").expanduser()


def ray_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that every Ray process of ours gets: token authentication on, loopback only, no usage reports.

    What the caller has set already wins. A Ray replica's gRPC port unpickles what it gets, on one machine too.
    """
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for binding to 127.0.0.1 instead of the host's address
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**ours, **environ}


def ensure_token(path: Path = TOKEN_PATH) -> None:
    """Write the token that Ray's authentication reads by default, if there is none yet, for this user's eyes only."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


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
    """Check a whole Serve config: Serve's schema, no key that it would ignore, and Greenroom's own arguments."""
    from ray.serve.schema import ServeDeploySchema

    from deployments.config import GreenroomConfig

    try:
        ServeDeploySchema.model_validate(config)
        unknown = list(unknown_keys(ServeDeploySchema, config))
        if unknown:
            raise ConfigError(f"unknown keys: {', '.join(unknown)}")
        for application in config["applications"]:
            if application["import_path"].startswith("deployments.app:"):
                GreenroomConfig.model_validate(application.get("args", {}))
    except ValidationError as error:
        raise ConfigError(str(error)) from error


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


def serve(config: dict[str, Any]) -> int:
    """Run `serve run` on the config until it ends or is interrupted; return its exit status."""
    with tempfile.NamedTemporaryFile("w", prefix="greenroom-", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        command = [str(Path(sys.executable).parent / "serve"), "run", file.name]
        # A shell starts what it puts into the background with SIGINT ignored, and a child would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, env=ray_environment(os.environ))
        # Ctrl-C reaches the child by itself, through the terminal's process group; SIGTERM has to be passed on.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
        return process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deployments.launch", description=__doc__)
    parser.add_argument("--config", type=Path, default=SERVE_CONFIG, help="a Serve config file (default: %(default)s)")
    parser.add_argument("--model", help="path of a local checkpoint, or a hub id, instead of the file's")
    parser.add_argument("--port", type=int, help="HTTP port instead of the file's")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.model, arguments.port)
    except ConfigError as error:
        parser.error(str(error))
    ensure_token()
    return serve(config)


if __name__ == "__main__":
    sys.exit(main())

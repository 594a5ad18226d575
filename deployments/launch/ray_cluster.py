"""What a Ray cluster has to be told, and a look at one before joining: environment, token, whether they fit."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import grpc

from deployments.launch.agreement import check_versions
from renderer.errors import ConfigError

TOKEN_PATH = Path("~/.ray/auth_token").expanduser()
LOOK_TIMEOUT_S = 10.0

# A replica's gRPC port unpickles what it gets, on one machine too: without a token whoever reaches it runs code there.
EVERYWHERE = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # A replica that fails its health check would be drained like any other, for as long as its longest stream may take;
    # what it has goes on elsewhere as soon as it is gone.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
ONE_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for binding to 127.0.0.1 instead of the host's address
}
# One haproxy a node in front of replicas that serve HTTP themselves; calls by value; user code on the replica's one
# loop. With these thresholds glibc maps no memory anew for each large buffer.
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "16777216",
}


def ray_environment(
    environ: Mapping[str, str], haproxy_folder: Path | None = None, one_machine: bool = True
) -> dict[str, str]:
    """The variables that every Ray process of ours gets, and every program that joins. What the caller set wins.

    Args:
        haproxy_folder: Where the high-throughput ingress keeps its configuration and sockets, which tells its process
            from others; None for the plain proxy.
        one_machine: Whether everything that can be is bound to loopback.
    """
    ours = dict(EVERYWHERE)
    if one_machine:
        ours |= ONE_MACHINE
    if haproxy_folder is not None:
        ours |= HAPROXY | _haproxy_files(haproxy_folder)
        if one_machine:
            # Nobody balances load in front of one machine: there is nobody to wait for when it stops.
            ours["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
    return {**ours, **environ}


def ensure_token(path: Path = TOKEN_PATH) -> None:
    """Write the token that Ray's authentication reads by default, if there is none yet, for this user's eyes only."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def look(address: str, environ: Mapping[str, str]) -> None:
    """Ask the cluster at an address who it is, as one of its own would, and return if it answers.

    Ray itself would try for two minutes, or for 20 seconds, and then say that it cannot connect.

    Args:
        address: Host and port of its GCS.
        environ: What a process that joins it gets.

    Raises:
        ConfigError: It would not work, or not be safe; the message says why and what to do.
    """
    if environ.get("RAY_USE_TLS", "0") != "0":
        return
    token = _token(environ) if environ.get("RAY_AUTH_MODE") == "token" else None
    without = _ask(address, None)
    if without is grpc.StatusCode.OK and token is not None:
        raise ConfigError(
            f"the Ray cluster at {address} runs without token authentication: whoever reaches a port of one of its "
            "replicas runs code there. Start it with RAY_AUTH_MODE=token in the environment of every `ray start` "
            "(docs/operations.md), or join it as it is with RAY_AUTH_MODE=disabled."
        )
    if without is grpc.StatusCode.UNAUTHENTICATED and token is None:
        raise ConfigError(f"the Ray cluster at {address} takes nobody without its token: set RAY_AUTH_MODE=token.")
    answer = without if token is None else _ask(address, token)
    if answer is grpc.StatusCode.UNAUTHENTICATED:
        raise ConfigError(
            f"the Ray cluster at {address} has another token than this process. Every node and every program needs the "
            f"same: RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or {TOKEN_PATH}."
        )
    if answer is not grpc.StatusCode.OK:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({answer.name}). The address is that of the head node's GCS: its "
            "host and the --port of `ray start --head`, 6379 by default."
        )
    check_versions(address, token)


def _ask(address: str, token: str | None) -> grpc.StatusCode:
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=LOOK_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def _token(environ: Mapping[str, str]) -> str:
    """The token, from where Ray looks for it.

    Raises:
        ConfigError: There is none.
    """
    if "RAY_AUTH_TOKEN" in environ:
        return environ["RAY_AUTH_TOKEN"]
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH", TOKEN_PATH))
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_MODE is token, and the token cannot be read: {error}") from error


def _haproxy_files(folder: Path) -> dict[str, str]:
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }

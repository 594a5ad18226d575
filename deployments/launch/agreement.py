"""Whether the processes of a running Ray cluster are what a program that joins it expects them to be.

Ray reads its variables in each process where it is imported, so a program can be told something else than the nodes
were, and would find out by what does not work.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import grpc

from renderer.errors import ConfigError

# Those by which Serve chooses its ingress and how calls cross; all of a cluster's processes must have the same.
AGREED = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
ASK_TIMEOUT_S = 10.0
JOIN_TIMEOUT_S = 120.0
# Run with the environment of a program that joins: prints what a process of the cluster has of the variables.
PROBE = """
import json, os, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
told = ray.remote(num_cpus=0)(lambda names: {name: os.environ.get(name, "0") for name in names})
print(json.dumps(ray.get(told.remote(sys.argv[2:]))))
"""


def check_versions(address: str, token: str | None) -> None:
    """Compare the cluster's Ray and Python with this process'; a cluster that does not say is taken as it is.

    Raises:
        ConfigError: They differ.
    """
    import ray

    theirs = _metadata(address, token)
    ours = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    differing = [name for name, version in ours.items() if theirs.get(name, version) != version]
    if differing:
        names = {"ray_version": "Ray", "python_version": "Python"}
        said = ", ".join(f"{names[name]} {theirs[name]} and not {ours[name]}" for name in differing)
        raise ConfigError(
            f"the Ray cluster at {address} runs {said} as here. Every node and every program needs the same versions: "
            "install them here, or start the cluster anew with those of constraints.txt."
        )


def check_settings(address: str, environ: Mapping[str, str]) -> None:
    """Compare what the cluster's processes were told with what one that joins gets. Takes some seconds: it joins.

    Raises:
        ConfigError: They differ, or the cluster cannot be joined.
    """
    command = [sys.executable, "-c", PROBE, address, *AGREED]
    try:
        probe = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=JOIN_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"the Ray cluster at {address} has run nothing within {JOIN_TIMEOUT_S:.0f} s") from error
    if probe.returncode != 0:
        raise ConfigError(f"the Ray cluster at {address} cannot be joined: {probe.stderr.strip().splitlines()[-1]}")
    compare(address, json.loads(probe.stdout.splitlines()[-1]), environ)


def compare(address: str, theirs: Mapping[str, str], environ: Mapping[str, str]) -> None:
    """See `check_settings`."""
    differing = [name for name in AGREED if theirs[name] != environ.get(name, "0")]
    if differing:
        said = ", ".join(f"{name}={theirs[name]} and not {environ.get(name, '0')}" for name in differing)
        raise ConfigError(
            f"the processes of the Ray cluster at {address} were started with {said}, as this command would have it. "
            "The ingress is the cluster's: with these variables at 1 in the environment of every `ray start` "
            "(docs/cluster/environment.sh) join with --ingress haproxy, without them with --ingress proxy."
        )


def _metadata(address: str, token: str | None) -> dict[str, Any]:
    """What the head node wrote down about the cluster; empty where it did not."""
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    request = gcs_service_pb2.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address) as channel:
        stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
        try:
            value = stub.InternalKVGet(request, timeout=ASK_TIMEOUT_S, metadata=metadata).value
        except grpc.RpcError:
            return {}
    found: dict[str, Any] = json.loads(value) if value else {}
    return found

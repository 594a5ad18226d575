"""A cluster of other versions or settings than ours. Its GCS is a real one, with what its head would write there."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from deployments.launch.agreement import AGREED, compare
from deployments.launch.ray_cluster import look
from renderer.errors import ConfigError
from tests.deployments.launch.test_ray_cluster import gcs

OURS = {"ray_version": ray.__version__, "python_version": platform.python_version()}
ENVIRON = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "the-token-of-the-cluster"}


def write_down(address: str, versions: dict[str, str]) -> None:
    request = gcs_service_pb2.InternalKVPutRequest(
        key=b"CLUSTER_METADATA", value=json.dumps(versions).encode(), overwrite=True, namespace=b"cluster"
    )
    with grpc.insecure_channel(address) as channel:
        stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
        stub.InternalKVPut(request, timeout=10, metadata=(("authorization", f"Bearer {ENVIRON['RAY_AUTH_TOKEN']}"),))


def test_a_cluster_of_other_versions_is_refused_with_both(tmp_path: Path) -> None:
    with gcs(tmp_path, "token") as address:
        look(address, ENVIRON)  # it says nothing of its versions
        write_down(address, OURS)
        look(address, ENVIRON)
        write_down(address, {**OURS, "ray_version": "2.59.0"})
        with pytest.raises(ConfigError, match=rf"runs Ray 2\.59\.0 and not {ray.__version__} as here"):
            look(address, ENVIRON)
        write_down(address, {**OURS, "python_version": "3.9.1"})
        with pytest.raises(ConfigError, match=r"runs Python 3\.9\.1 and not"):
            look(address, ENVIRON)


PLAIN, FAST = dict.fromkeys(AGREED, "0"), dict.fromkeys(AGREED, "1")


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (PLAIN, {}, None),
        (PLAIN, PLAIN, None),
        (FAST, FAST, None),
        (PLAIN, FAST, "RAY_SERVE_ENABLE_HA_PROXY=0 and not 1"),
        (FAST, {}, "RAY_SERVE_ENABLE_HA_PROXY=1 and not 0"),
        ({**FAST, "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}, FAST, "with RAY_SERVE_THROUGHPUT_OPTIMIZED=0 and not 1,"),
    ],
)
def test_the_ingress_is_the_clusters_and_a_program_must_know_it(
    theirs: dict[str, str], ours: dict[str, str], said: str | None
) -> None:
    if said is None:
        compare("head:6379", theirs, ours)
    else:
        with pytest.raises(ConfigError, match=said):
            compare("head:6379", theirs, ours)

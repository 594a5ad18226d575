"""Who is let in beside the front door: Ray's own ports, and a cluster that is looked at before it is joined."""

from __future__ import annotations

import ipaddress
import os
import pickle
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import ray
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from deployments.launch.agreement import check_settings
from deployments.launch.ray_cluster import look
from renderer.errors import ConfigError
from tests.stack.helpers import Application


class Exploit:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.fixture
def replica_port(render_only: Application) -> int:
    """The gRPC port of a replica, as every handle to it knows it."""
    render_only.call("tokenize", {"prompt": "a"})
    replicas = render_only.handle._router._asyncio_router.request_router.curr_replicas
    (replica,) = replicas.values()
    return int(replica._replica_info.port)


def attack(port: int, path: Path, token: str | None) -> grpc.StatusCode:
    """Send a replica a pickle that makes a file; return the answer's code."""
    request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Exploit(path)))
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(request, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("token", [None, "", "wrong"])
def test_a_replicas_port_unpickles_nothing_of_a_caller_without_the_token(
    replica_port: int, tmp_path: Path, token: str | None
) -> None:
    made = tmp_path / "made"
    assert attack(replica_port, made, token) is grpc.StatusCode.UNAUTHENTICATED
    assert not made.exists()


def test_with_the_token_it_would(replica_port: int, tmp_path: Path) -> None:
    made = tmp_path / "made"
    attack(replica_port, made, os.environ["RAY_AUTH_TOKEN"])
    assert made.exists(), "the tests above would not notice an open port"


def test_nothing_but_the_replicas_own_ports_listens_beyond_loopback(
    render_only: Application, replica_port: int
) -> None:
    render_only.call("tokenize", {"prompt": "a"})
    beyond = {
        (" ".join(process.cmdline()), connection.laddr.ip, connection.laddr.port)
        for process in psutil.Process().children(recursive=True)
        for connection in listening(process)
        if not is_loopback(connection.laddr.ip)
    }
    assert replica_port in {port for _, _, port in beyond}, "the test would not notice a port"
    assert [each for each in beyond if not each[0].startswith("ray::ServeReplica:")] == []


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def listening(process: psutil.Process) -> list[Any]:
    with suppress(psutil.Error):  # it may end meanwhile
        return [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "another token"),
        ({"RAY_AUTH_MODE": "disabled"}, "takes nobody without its token"),
    ],
)
def test_a_cluster_that_would_not_take_us_is_told_apart_at_once(
    render_only: Application, changes: dict[str, str], said: str
) -> None:
    address = ray.get_runtime_context().gcs_address
    look(address, os.environ)
    with pytest.raises(ConfigError, match=said):
        look(address, {**os.environ, **changes})


def test_a_cluster_with_the_other_ingress_is_told_apart(render_only: Application) -> None:
    address = ray.get_runtime_context().gcs_address
    with pytest.raises(ConfigError, match="RAY_SERVE_ENABLE_HA_PROXY=0 and not 1"):
        check_settings(address, {**os.environ, "RAY_SERVE_ENABLE_HA_PROXY": "1"})


def test_an_address_where_no_cluster_is_says_so_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at 127.0.0.1:{port}"):
        look(f"127.0.0.1:{port}", os.environ)


def test_a_token_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere")}
    with pytest.raises(ConfigError, match="nowhere"):
        look("127.0.0.1:1", environ)

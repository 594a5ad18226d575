"""A Ray cluster of the tests' own, deployed to by config as an operator does, and the processes that it consists of.

`GREENROOM_INGRESS=haproxy` in the environment puts it behind the high-throughput ingress. Only the cluster's processes
are told: this one stays as it was imported, a program that joins and calls handles.

Other clusters may run on this machine: what is killed here is always a process that this cluster's own state names.
"""

from __future__ import annotations

import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast, get_args

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.launch.ray_cluster import ray_environment
from deployments.launch.serving import HAPROXY_PORTS, Ingress, end_leftovers
from tests.stack.helpers import Application, wait_until

INGRESS = cast(Ingress, os.environ.get("GREENROOM_INGRESS") or "proxy")
START_S = 600
# Of routers that serve HTTP themselves; not those of clusters with the default ports.
REPLICA_PORTS = {"MIN": "36200", "MAX": "36400"}
CPUS = 16  # that a node has to give away, whatever the machine has


@dataclass(frozen=True)
class Replica:
    """One replica as Serve's controller knows it."""

    deployment: str
    name: str
    pid: int
    node: str


@dataclass(frozen=True)
class RayCluster:
    """A running cluster. `nodes` adds and removes nodes of it, all on this machine.

    Attributes:
        second_address: Of the proxy of a node other than the head.
        haproxy: Where haproxy keeps its files, if that is what takes the requests.
        applications: Those deployed, by name, as a config file has them: Serve is always told all of them.
    """

    address: str
    nodes: Cluster
    second_address: str
    haproxy: Path | None = None
    applications: dict[str, dict[str, Any]] = field(default_factory=dict)

    def deploy(self) -> None:
        config = {"applications": list(self.applications.values())}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))

    def proxy_pid(self) -> int:
        """The process that takes the requests at `address`.

        Raises:
            LookupError: There is none now, as far as is known.
        """
        return _proxy_pid(self.nodes.head_node.node_id) if self.haproxy is None else _haproxy_pid(self.haproxy)


@contextmanager
def ray_cluster(cpus: int = CPUS, ingress: Ingress = INGRESS) -> Iterator[RayCluster]:
    """A cluster of one node that has so many CPUs to give away, whatever the machine has."""
    assert ingress in get_args(Ingress), ingress
    port, second_port = free_port(), free_port()
    # In a folder of its own: in the usual one Ray writes down the cluster that whoever names none is to join.
    # haproxy's is not below it: the paths of its sockets may have 97 characters, 57 of which are for the node's id.
    with (
        TemporaryDirectory(prefix="greenroom-") as folder,
        TemporaryDirectory(prefix="greenroom-") as other,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        haproxy = Path(other) if ingress == "haproxy" else None
        own = {"RAY_TMPDIR": folder, "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(second_port)}
        state = Path(folder, "state")
        state.mkdir()
        own |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(state)}  # as docs/cluster/head.sh
        with _environment(**ray_environment({}, haproxy), **own, **({} if haproxy is None else _own_ports())):
            nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
            ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
            try:
                serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": port})
                yield RayCluster(f"http://127.0.0.1:{port}", nodes, f"http://127.0.0.1:{second_port}", haproxy)
            finally:
                serve.shutdown()
                ray.shutdown()
                nodes.shutdown()
                if haproxy is not None:
                    end_leftovers(str(haproxy))


def _own_ports() -> dict[str, str]:
    """Of a haproxy, and of the routers behind it."""
    ports = {name: str(free_port()) for name, _ in HAPROXY_PORTS.values()}
    return ports | {f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT": number for end, number in REPLICA_PORTS.items()}


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables that this process and those that it starts have meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Deployed(Application):
    """An application deployed by config: told again with other arguments or numbers, it is updated in place."""

    def __init__(
        self, name: str, cluster: RayCluster, args: Mapping[str, Any], **deployments: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.cluster = cluster
        self.update(args, **deployments)
        self.wait_until_running()
        super().__init__(name, f"{cluster.address}/{name}", serve.get_app_handle(name))
        self._settle()

    def update(
        self, args: Mapping[str, Any], policy: Mapping[str, Any] | None = None, **deployments: Mapping[str, Any]
    ) -> None:
        """Deploy, or deploy again; returns before the update has been made.

        Args:
            policy: The application's `autoscaling_policy`.
            deployments: Serve's options by deployment, as in the `deployments` section of a config file.
        """
        self.cluster.applications[self.name] = {
            "name": self.name,
            "route_prefix": f"/{self.name}",
            "import_path": "deployments.app:build",
            "args": dict(args),
            "deployments": [{"name": deployment, **options} for deployment, options in deployments.items()],
            "autoscaling_policy": policy,
        }
        self.cluster.deploy()

    def wait_until_running(self) -> None:
        def runs() -> bool:
            application = serve.status().applications.get(self.name)
            assert application is None or application.status != "DEPLOY_FAILED", application
            return application is not None and application.status == "RUNNING"

        wait_until(runs, START_S, "the application runs")

    def replicas(self, deployment: str, state: str = "RUNNING") -> list[Replica]:
        """The replicas of a deployment that are in a state, oldest first; dead ones that the controller has yet to
        notice left out."""
        details = _get_global_client().get_serve_details()["applications"][self.name]
        assert details["status"] != "DEPLOY_FAILED", details["message"]
        # While an update is being built, the application has no deployments to show.
        replicas = details["deployments"].get(deployment, {"replicas": []})["replicas"]
        found = [replica for replica in replicas if replica["state"] == state and _lives(replica["pid"])]
        found.sort(key=lambda replica: float(replica["start_time_s"]))
        return [Replica(deployment, each["replica_id"], each["pid"], each["node_id"]) for each in found]

    def wait_for_replicas(self, **numbers: int) -> None:
        """Until each deployment has so many running replicas, and no other."""

        def there() -> bool:
            states = serve.status().applications[self.name].deployments
            return all(
                name in states and states[name].replica_states == {"RUNNING": number}
                for name, number in numbers.items()
            )

        wait_until(there, START_S, f"replicas: {numbers}")

    def close(self) -> None:
        self.http.close()
        del self.cluster.applications[self.name]
        self.cluster.deploy()
        wait_until(lambda: self.name not in serve.status().applications, START_S, "the application is gone")

    def _settle(self) -> None:
        """Until the proxy has the route: it may answer 404 for a moment."""
        wait_until(lambda: self.http.get("/v1/models").status_code == 200, 60, "the proxy knows the route")


def core_of(engine: Replica) -> psutil.Process:
    """The engine core of an engine replica: its child that runs `engine.core`."""
    for child in psutil.Process(engine.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "engine.core" in " ".join(child.cmdline()):
                return child
    raise LookupError(f"engine replica {engine.name} has no core")


def kill(pid: int) -> None:
    """kill -9, and wait until the process is gone."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _lives(pid):
        assert time.monotonic() < deadline, f"process {pid} outlives its kill"
        time.sleep(0.01)


def _lives(pid: int | None) -> bool:
    try:
        return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _haproxy_pid(folder: Path) -> int:
    """The youngest haproxy that was told of a folder: older ones only end what they have."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it may end meanwhile
            if process.name() == "haproxy" and str(folder) in " ".join(process.cmdline()) and _lives(process.pid):
                found.append((process.create_time(), process.pid))
    if not found:
        raise LookupError("no haproxy runs")
    return max(found)[1]


def _proxy_pid(node: str) -> int:
    """The process of Serve's proxy on a node, as the controller knows it: one of both may have just started."""
    proxy = _get_global_client().get_serve_details()["proxies"].get(node)
    if proxy is None:
        raise LookupError("the controller knows of no proxy there")
    actor = ray.get_actor(proxy["actor_name"], namespace=SERVE_NAMESPACE)
    return int(ray.get(actor.__ray_call__.remote(_own_pid), timeout=30))


def controller_pid() -> int:
    return int(ray.get(_get_global_client()._controller.__ray_call__.remote(_own_pid), timeout=30))


_own_pid: Callable[[Any], int] = lambda actor: os.getpid()  # noqa: E731  # pickled by value: actors cannot import tests

"""A node is lost under load: the cluster heals by itself, and only what ran there is retried."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import ray

from tests.faults.cluster import CPUS, START_S, Deployed, RayCluster
from tests.faults.conftest import PATIENT, TIERS, TWO
from tests.faults.traffic import Traffic, known_answers, mixed_asks
from tests.stack.helpers import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S)]

# One replica of each tier a node: what the lost node had can only come back on the one that replaces it.
ONE_A_NODE = {"num_replicas": 2, "autoscaling_config": None, "max_replicas_per_node": 1}
CLIENTS = 4  # of each node's proxy


@pytest.fixture
def two_nodes(cluster: RayCluster) -> Iterator[object]:
    """The second of two nodes."""
    if cluster.haproxy is not None:
        pytest.skip("two haproxies of one host would have the same ports and files: each node's are of its own machine")
    node = cluster.nodes.add_node(num_cpus=CPUS)
    wait_until(lambda: alive_nodes() == 2, 60, "two nodes")
    yield node
    for worker in list(cluster.nodes.worker_nodes):
        cluster.nodes.remove_node(worker)


def test_a_lost_node_takes_only_what_ran_there_and_its_replicas_come_back_on_another(
    cluster: RayCluster, two_nodes: object
) -> None:
    app = Deployed("nodes", cluster, PATIENT, **dict.fromkeys(TIERS, ONE_A_NODE))
    app.wait_for_replicas(**dict.fromkeys(TIERS, 2))
    lost = {replica.name for tier in TIERS for replica in app.replicas(tier) if replica.node == two_nodes.node_id}  # type: ignore[attr-defined]
    assert len(lost) == len(TIERS)
    asks = mixed_asks(random.Random(7), 32)
    known = list(zip(asks, known_answers(app.url, asks), strict=True))
    with (
        Traffic(app.url, known, clients=CLIENTS) as kept,
        Traffic(f"{cluster.second_address}/{app.name}", known, clients=CLIENTS) as cut,
    ):
        for traffic in (kept, cut):
            traffic.wait_for(30)
        cluster.nodes.remove_node(two_nodes, allow_graceful=False)
        wait_until(lambda: alive_nodes() == 1, 120, "the cluster knows of its loss")
        lost_at = time.time()
        kept.wait_for(60)
        assert all(lost & {replica.name for replica in app.replicas(tier)} == set() for tier in TIERS)
        cluster.nodes.add_node(num_cpus=CPUS)
        app.wait_for_replicas(**dict.fromkeys(TIERS, 2))
        for traffic in (kept, cut):
            traffic.wait_for(30)
    app.close()
    assert (kept.failures, cut.failures) == ([], [])
    assert lost & {each.answer.replica for each in kept.outcomes if each.answer}, "its replicas worked for others"
    assert kept.broken == [], "whose ingress lives notices nothing, whatever worked for it"
    assert 0 < len(cut.broken) <= CLIENTS, "the lost ingress took what each client had there, once"
    assert all(outcome.begun < lost_at for outcome in cut.outcomes if outcome.broken)


def test_a_drained_node_gives_its_replicas_up_before_it_goes_and_no_request_breaks(
    cluster: RayCluster, two_nodes: object
) -> None:
    app = Deployed("drained", cluster, PATIENT, **dict.fromkeys(TIERS, TWO))
    node: str = two_nodes.node_id  # type: ignore[attr-defined]

    def there() -> set[str]:
        return {replica.name for tier in TIERS for replica in app.replicas(tier) if replica.node == node}

    assert there(), "it would have nothing to give up"
    asks = mixed_asks(random.Random(8), 32)
    known = list(zip(asks, known_answers(app.url, asks), strict=True))
    with Traffic(app.url, known, clients=CLIENTS) as traffic:
        traffic.wait_for(20)
        drain(cluster.nodes.address, node)
        wait_until(lambda: not there(), START_S, "the node has no replica")
        app.wait_for_replicas(**dict.fromkeys(TIERS, 2))
        cluster.nodes.remove_node(two_nodes)
        traffic.wait_for(20)
    app.close()
    assert (traffic.failures, traffic.broken) == ([], [])


def drain(address: str, node: str) -> None:
    """As docs/operations.md has it."""
    command = ["ray", "drain-node", "--address", address, "--node-id", node]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "maintenance"]
    told = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *command[1:], *why], capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr


def alive_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())

"""`make soak`: ten thousand mixed requests with a fault every 20 seconds, on a cluster of its own."""

from __future__ import annotations

import argparse
import sys
import time
from typing import get_args

import tests.conftest  # noqa: F401  # sets Ray's environment, before Ray is imported

from rich.console import Console  # isort: skip

from deployments.launch.serving import Ingress  # isort: skip
from tests.faults.cluster import CPUS, INGRESS, Deployed, ray_cluster  # isort: skip
from tests.faults.conftest import PATIENT, TIERS, TWO  # isort: skip
from tests.soak.run import Plan, show, soak  # isort: skip

# What a process may take to end after its cluster has been shut down.
END_S = 20.0
# A replica that is killed while it starts is a failed start to Serve, and the third in an update would end the update.
ATTEMPTS = {"start_attempts": 100}
ARGS = {**PATIENT, **{tier: {**PATIENT.get(tier, {}), **ATTEMPTS} for tier in ("router", "render", "engine")}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--every", type=float, default=20.0, metavar="SECONDS", help="between faults (default: 20)")
    parser.add_argument("--clients", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ingress", choices=get_args(Ingress), default=INGRESS, help="(default: %(default)s)")
    arguments = parser.parse_args()
    console = Console()
    plan = Plan(arguments.requests, arguments.every, arguments.clients, seed=arguments.seed)
    deployments = dict.fromkeys(TIERS, TWO)
    nodes = 1 if arguments.ingress == "haproxy" else 2  # a host has one haproxy
    console.print(f"starting a cluster, two replicas a tier, {nodes} node(s), behind {arguments.ingress}")
    with ray_cluster(ingress=arguments.ingress) as cluster:
        for _ in range(1, nodes):
            cluster.nodes.add_node(num_cpus=CPUS)
        app = Deployed("soak", cluster, ARGS, **deployments)
        result = soak(app, ARGS, deployments, plan, console)
        app.close()
    deadline = time.monotonic() + END_S
    while result.census.alive() and time.monotonic() < deadline:
        time.sleep(0.5)
    show(result, console)
    left = [f"{life.role} {life.pid} outlives its cluster" for life in result.census.alive()]
    left += [f"left in shared memory: {path}" for path in result.census.left_in_shared_memory()]
    for each in left:
        console.print(f"[red]{each}[/red]")
    well = not result.problems and not left
    console.print("[green]well[/green]" if well else "[red]not well[/red]")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

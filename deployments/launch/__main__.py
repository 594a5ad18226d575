"""`make serve`, `make serve-fast`: the applications of a Serve config file, in the foreground until Ctrl-C.

The file is checked whole before anything starts; a cluster that is joined is asked first whether it would work.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from deployments.launch.agreement import check_settings
from deployments.launch.config_file import SERVE_CONFIG, load_config
from deployments.launch.ray_cluster import ensure_token, look
from deployments.launch.serving import Ingress, check_haproxy, check_ports, environment_of, find_cluster, serve
from renderer.errors import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deployments.launch", description=__doc__)
    parser.add_argument("--config", type=Path, default=SERVE_CONFIG, help="a Serve config file (default: %(default)s)")
    parser.add_argument("--model", help="path of a local checkpoint, or a hub id, instead of the file's")
    parser.add_argument("--port", type=int, help="HTTP port instead of the file's")
    parser.add_argument(
        "--ingress",
        choices=get_args(Ingress),
        default="proxy",
        help="Serve's own proxy, or haproxy: for production (default: %(default)s)",
    )
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="host:port of a running Ray cluster to join (default: start one on this machine)",
    )
    parser.add_argument("--check", action="store_true", help="check the file and do nothing else")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.model, arguments.port)
        if arguments.check:
            print(f"{arguments.config}: in order")
            return 0
        address = None if arguments.address is None else find_cluster(arguments.address, os.environ)
        if address is None:
            ensure_token()
            check_ports(config, arguments.ingress, os.environ)
            if arguments.ingress == "haproxy":
                check_haproxy(os.environ)
        else:
            environment = environment_of(arguments.ingress, address, Path())
            look(address, environment)
            check_settings(address, environment)
            print(f"Ctrl-C ends Serve on the cluster at {address}, and every application there", flush=True)
    except ConfigError as error:
        parser.error(str(error))
    return serve(config, arguments.ingress, address)


if __name__ == "__main__":
    sys.exit(main())

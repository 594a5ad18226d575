#!/usr/bin/env bash
# Join a node to the cluster of head.sh. RENDER counts the render replicas that it takes; 0 on a GPU node.
#
# HEAD=10.0.0.1:6379 RENDER=8 bash docs/cluster/worker.sh
set -euo pipefail
source "$(dirname "$0")/environment.sh"

exec ray start --block \
    --address "${HEAD:?host:port of the head node}" \
    --resources "{\"render\": ${RENDER:-0}}" \
    --metrics-export-port "${METRICS_PORT:-8080}" \
    ${RAY_ARGS:-}

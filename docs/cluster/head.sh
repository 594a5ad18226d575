#!/usr/bin/env bash
# Start the head node: no replicas on it but a router. STATE must survive the machine: with it a new head goes on with
# the cluster, and the replicas never stopped.
#
# STATE=/persistent/greenroom PORT=6379 bash docs/cluster/head.sh
set -euo pipefail
source "$(dirname "$0")/environment.sh"

export RAY_gcs_storage=rocksdb
export RAY_gcs_storage_path="${STATE:?a folder that survives this machine}"
mkdir -p "$RAY_gcs_storage_path"

exec ray start --head --block \
    --port "${PORT:-6379}" \
    --num-cpus "${CPUS:-1}" --num-gpus 0 \
    --dashboard-host 127.0.0.1 \
    --metrics-export-port "${METRICS_PORT:-8080}" \
    ${RAY_ARGS:-}

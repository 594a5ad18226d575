# What every Ray process and every program of the cluster needs; source it on each machine, head included.
#
# The token file must hold the same token everywhere: make it once (`ray get-auth-token --generate`, which writes
# ~/.ray/auth_token) and copy it, readable for the user that runs Ray alone.

export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
export RAY_USAGE_STATS_ENABLED=0
export TOKENIZERS_PARALLELISM=false

# A replica that hangs is killed, not drained: its requests go on elsewhere then.
export RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1

# The high-throughput ingress: a haproxy on each node, in front of routers that serve HTTP themselves.
export RAY_SERVE_ENABLE_HA_PROXY=1
export RAY_SERVE_THROUGHPUT_OPTIMIZED=1
export RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH=268435456
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648 MALLOC_TOP_PAD_=16777216

# A head that is away longer than this takes its workers with it.
export RAY_gcs_rpc_server_reconnect_timeout_s=600

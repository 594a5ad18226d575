"""Ray reads its environment when it is imported, so what every test's Ray gets is set here, before anything else.

Token authentication is on and everything that can be is bound to loopback, as in what `make` starts.
"""

import os
import secrets
import warnings

os.environ.update(
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
)

# Ray warns about its own code when it is imported; here a warning is an error.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401

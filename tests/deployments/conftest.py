"""Ray Serve warns about its own code when it is imported; here a warning is an error, so it is imported first."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401

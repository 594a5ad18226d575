"""How many replicas a handle's deployment has, as the process that holds the handle knows it."""

from __future__ import annotations

from typing import Any


def running_replicas(handle: Any) -> int | None:
    """Replicas that calls through this handle can reach now; None before the handle has been told of any.

    Ray Serve 2.60 keeps it to itself; what it offers instead asks the controller or every replica.
    """
    router = getattr(handle._router, "_asyncio_router", None)
    if router is None or router.request_router is None or router._running_replicas is None:
        return None
    return len(router.request_router.curr_replicas)

"""What the first requests to a fresh server cost."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from bench.bodies import CASES
from bench.load import Client

STEADY = 21
# In this order: the usual image first, because the first image is what a cold server stumbles over.
REQUESTS = ("640x480", "4 x 1280x720", "layout, 4 x 1280x720", "text")


def cold_start(name: str, url: str) -> list[dict[str, Any]]:
    """The first request of each kind to a server that has just become healthy, against the median of later ones."""
    rows = []
    client = Client(url, "application/json")
    for request in REQUESTS:
        bodies = next(case for case in CASES if case.name == request).bodies()
        taken = [_ms(client, bodies()) for _ in range(1 + STEADY)]
        steady = median(taken[1:])
        rows.append(
            {"server": name, "request": request, "first ms": taken[0], "steady ms": steady, "ratio": taken[0] / steady}
        )
    client.close()
    return rows


def _ms(client: Client, body: bytes) -> float:
    sent = time.perf_counter()
    client.send(body)
    return (time.perf_counter() - sent) * 1e3

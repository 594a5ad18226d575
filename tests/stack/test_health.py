"""Health and reports of replicas that have all the requests that they take."""

from __future__ import annotations

import asyncio
import time

import httpx

from deployments.config import LaneConfig
from tests.stack.helpers import Application, wait_until

FULL = LaneConfig().requests


async def test_a_saturated_replica_reports_and_the_application_is_healthy(whole: Application) -> None:
    endless = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3000, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=whole.url, timeout=60) as http, asyncio.TaskGroup() as group:
        streams = [group.create_task(http.post("/v1/chat/completions", json=endless)) for _ in range(FULL)]
        try:
            await asyncio.to_thread(wait_until, lambda: under_way(whole) == FULL, 30, "the replica is full")
            refused = await http.post("/v1/chat/completions", json=endless)
            begun = time.monotonic()
            health = await http.get("/health")
            took_s = time.monotonic() - begun
        finally:
            for stream in streams:
                stream.cancel()
    assert refused.status_code == 503
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert [len(tier) for tier in health.json()["tiers"].values()] == [1, 1, 1]
    assert took_s < 2
    await asyncio.to_thread(wait_until, lambda: under_way(whole) == 0, 10, "the replica is idle")


def under_way(app: Application) -> int:
    stats = app.report("engine").engine
    assert stats is not None
    return stats.running + stats.waiting

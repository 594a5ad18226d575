"""What the stack's tests ask with: pictures whose answers are known, two ways to ask, and the replicas' own figures."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
from openai import OpenAI

from demo.scenes import COLORS, SHAPES, Background, Scene, Shape, draw
from deployments.calls import ReplicaReport
from renderer.caches import CacheStats

SIDE = 224  # pixels; the processor leaves this size as it is
ITEM_BYTES = (SIDE // 14) ** 2 * 3 * 2 * 14 * 14 + 3 * 8  # uint8 patches, and the int64 grid
TOKENS = (SIDE // 28) ** 2
QUESTION = "What colour is the shape?"
PALE, DARK = (211, 211, 211), (64, 64, 64)


@dataclass(frozen=True)
class Picture:
    """One shape in the middle, encoded, and its colour."""

    png: bytes
    color: str

    @property
    def url(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@cache
def picture(number: int) -> Picture:
    """Another picture for each number up to 63: every colour with every shape, on a pale and on a dark ground."""
    color = list(COLORS)[number % len(COLORS)]
    shape = SHAPES[number // len(COLORS) % len(SHAPES)]
    ground = DARK if color == "white" or (number >= 32 and color != "black") else PALE
    radius = 62.0 if number < 32 else 48.0
    centre = Shape(shape, color, COLORS[color][0], SIDE / 2, SIDE / 2, radius)
    image = draw(Scene(SIDE, SIDE, (centre,), Background("plain", ground, ground)))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Picture(stream.getvalue(), color)


def about(*pictures: Picture, text: str = QUESTION) -> list[dict[str, Any]]:
    """A user's message about pictures."""
    images = [{"type": "image_url", "image_url": {"url": each.url}} for each in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


class Application:
    """One deployed application, asked over HTTP or through its handle."""

    def __init__(self, name: str, url: str, handle: Any) -> None:
        self.name = name
        self.url = url
        self.handle = handle
        self.http = httpx.Client(base_url=url, timeout=60)

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return self.http.post(path, json=body)

    def call(self, method: str, body: Mapping[str, Any]) -> Any:
        return getattr(self.handle, method).remote(body).result(timeout_s=60)

    def tiers(self) -> Mapping[str, tuple[ReplicaReport, ...]]:
        tiers: Mapping[str, tuple[ReplicaReport, ...]] = self.handle.health.remote().result(timeout_s=30)
        return tiers

    def report(self, tier: str) -> ReplicaReport:
        """The record of a tier's only replica."""
        (report,) = self.tiers()[tier]
        return report

    def cache(self, tier: str, name: str) -> CacheStats:
        return self.report(tier).caches[name]

    def clear(self) -> None:
        """Empty every media cache and its statistics."""
        assert self.post("/v1/clear_mm_cache", {}).status_code == 200


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Return once the condition holds; fail where it does not in time.

    Asking takes a fourth of a core at most: what is waited for needs the machine too.
    """
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if condition():
            return
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(min(0.5, max(0.02, 3 * (time.monotonic() - asked))))


async def streams_with_a_death(app: Application, body: Mapping[str, object], kill: Callable[[], None]) -> list[str]:
    """Texts of four streams, with something killed once all have begun."""
    begun = asyncio.Barrier(5)

    async def stream(http: httpx.AsyncClient) -> str:
        text, first = "", True
        async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = httpx.Response(200, content=line.removeprefix("data: ")).json()
                    assert "error" not in chunk, chunk
                    text += chunk["choices"][0]["delta"].get("content", "")
                    if first:
                        first = False
                        await begun.wait()
        return text

    async with httpx.AsyncClient(base_url=app.url, timeout=300) as http, asyncio.TaskGroup() as group:
        tasks = [group.create_task(stream(http)) for _ in range(4)]
        await begun.wait()
        await asyncio.to_thread(kill)
    return [task.result() for task in tasks]

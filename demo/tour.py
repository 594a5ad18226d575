"""What `make demo` shows: an image's way through the tiers over HTTP, who did what, and how long each took."""

from __future__ import annotations

import base64
import io
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from rich.console import Console
from rich.table import Table

STEADY_REQUESTS = 10
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One request of the tour: what was asked, who answered, and its milliseconds at the client."""

    what: str
    tier: str
    replica: str
    stages: str
    first_ms: float
    total_ms: float


class Tour:
    def __init__(self, console: Console, url: str, image: Path, question: str) -> None:
        self.console = console
        self.http = httpx.Client(base_url=url, timeout=60)
        self.image = image
        self.question = question
        self.steps: list[Step] = []

    def run(self) -> None:
        first = self._first_images()
        self._ask("Ask about the image", stream=True)
        self._layout()
        before = self._sender_cache()
        usage = self._ask("Ask again", stream=False)
        self._show_cache(before, self._sender_cache(), usage)
        self._show_steps()
        self._show_warmup()
        self._show_first(first)

    def _first_images(self) -> dict[str, list[float]]:
        """Milliseconds of image requests by tier, the very first one first; every image is another one."""
        pictures = (_variant(self.image, number) for number in itertools.count())
        timings: dict[str, list[float]] = {}
        routes = {"render": "/v1/chat/completions/render", "engine": "/v1/chat/completions"}
        for tier, route in routes.items():
            bodies = [
                _body(picture, self.question, max_tokens=1)
                for picture in itertools.islice(pictures, STEADY_REQUESTS + 1)
            ]
            timings[tier] = [self._milliseconds(route, body) for body in bodies]
        return timings

    def _milliseconds(self, route: str, body: Body) -> float:
        begin = time.perf_counter()
        self.http.post(route, json=body).raise_for_status()
        return (time.perf_counter() - begin) * 1000

    def _ask(self, what: str, stream: bool) -> Body:
        """Ask the question, print the answer as it comes, return the usage."""
        body = _body(self.image.read_bytes(), self.question, stream=stream)
        self.console.print(f"\n[bold]{what}[/bold]  {self.image.name}: {self.question}")
        begin = time.perf_counter()
        if not stream:
            response = self.http.post("/v1/chat/completions", json=body).raise_for_status()
            self._note(what, response, begin, None)
            answer = response.json()
            self.console.print(f"  [cyan]{answer['choices'][0]['message']['content']}[/cyan]")
            return dict(answer["usage"])
        return self._stream(what, body, begin)

    def _stream(self, what: str, body: Body, begin: float) -> Body:
        first: float | None = None
        usage: Body = {}
        body["stream_options"] = {"include_usage": True}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            self.console.print("  ", end="")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    first = first or time.perf_counter()
                    self.console.print(f"[cyan]{choice['delta'].get('content') or ''}[/cyan]", end="")
            self.console.print()
            self._note(what, response, begin, first)
        return dict(usage)

    def _layout(self) -> None:
        """Render the same request without an engine and without its tensors: what a gateway needs to route it."""
        self.console.print("\n[bold]Its layout[/bold]  render-only, no pixel touched")
        begin = time.perf_counter()
        body = _body(self.image.read_bytes(), self.question, mm_payload="none")
        response = self.http.post("/v1/chat/completions/render", json=body).raise_for_status()
        self._note("Layout", response, begin, None)
        rendered = response.json()
        place = rendered["features"]["mm_placeholders"]["image"][0]
        self.console.print(
            f"  {len(rendered['token_ids'])} tokens; the image stands at {place['offset']} .. "
            f"{place['offset'] + place['length'] - 1} ({place['length']} tokens)\n"
            f"  its hash is {rendered['features']['mm_hashes']['image'][0]}"
        )

    def _note(self, what: str, response: httpx.Response, begin: float, first: float | None) -> None:
        now = time.perf_counter()
        headers = response.headers
        first_ms = ((first or now) - begin) * 1000
        stages = headers["server-timing"].replace(";dur=", " ")
        step = Step(
            what, headers["x-greenroom-tier"], headers["x-greenroom-replica"], stages, first_ms, (now - begin) * 1000
        )
        self.steps.append(step)

    def _tiers(self) -> dict[str, list[Body]]:
        return dict(self.http.get("/health").raise_for_status().json()["tiers"])

    def _sender_cache(self) -> Body:
        return dict(self._tiers()["engine"][0]["caches"]["sender"])

    def _show_cache(self, before: Body, after: Body, usage: Body) -> None:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        hits, misses = after["hits"] - before["hits"], after["misses"] - before["misses"]
        self.console.print(
            f"  from the cache: {hits} image known to the engine, {misses} sent to it; "
            f"{cached} of {usage['prompt_tokens']} prompt tokens not computed again"
        )
        if (hits, misses) != (1, 0):
            raise RuntimeError(f"the second question should find its image in the cache: {hits} hits, {misses} misses")

    def _show_steps(self) -> None:
        table = Table(title="\nWho did what", title_justify="left")
        for name in ("request", "tier", "replica", "first ms", "total ms", "on the server, ms"):
            table.add_column(name, justify="right" if name.endswith("ms") and "server" not in name else "left")
        for step in self.steps:
            table.add_row(
                step.what, step.tier, step.replica, f"{step.first_ms:.1f}", f"{step.total_ms:.1f}", step.stages
            )
        self.console.print(table)

    def _show_warmup(self) -> None:
        table = Table(title="\nWarm before the first request", title_justify="left")
        for name in ("tier", "replica", "warm-up steps, s", "warm until the first request, s"):
            table.add_column(name)
        for tier, replicas in self._tiers().items():
            for replica in replicas:
                steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in replica["warmup_s"].items())
                first = replica["first_request_at"]
                waited = "none yet" if first is None else f"{first - replica['warmup_ended_at']:.2f}"
                table.add_row(tier, replica["replica"], steps, waited)
        self.console.print(table)

    def _show_first(self, timings: dict[str, list[float]]) -> None:
        table = Table(title="\nThe first image request beside the steady state", title_justify="left")
        for name in ("tier", "first, ms", f"median of the next {STEADY_REQUESTS}, ms", "ratio"):
            table.add_column(name, justify="left" if name == "tier" else "right")
        for tier, (first, *steady) in timings.items():
            usual = statistics.median(steady)
            table.add_row(tier, f"{first:.1f}", f"{usual:.1f}", f"{first / usual:.2f}")
        self.console.print(table)


def _body(image: bytes, question: str, **fields: Any) -> Body:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"model": "demo/model", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def _variant(path: Path, number: int) -> bytes:
    """The image with one pixel of another colour: new content that costs what the original costs."""
    with Image.open(path) as image:
        changed = image.convert("RGB")
    changed.putpixel((number, 0), (number, number, number))
    buffer = io.BytesIO()
    changed.save(buffer, "PNG")
    return buffer.getvalue()

"""What a new replica does before anybody can reach it: it answers itself, an ingress through its own routes.

Warm processors are not all that a first request meets: routes, body parsing, the answer's writing, and for a router the
ways to its tiers run here for the first time. Nothing of it is counted, and nothing stays in a cache.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import orjson
from fastapi import FastAPI
from starlette.types import Message

from deployments.bodies.chat import RenderChatBody
from deployments.bodies.strict import parse
from deployments.calls import Envelope, RenderCall
from deployments.client import user
from deployments.error_response import add_error_handlers
from deployments.http.routes import render_routes
from deployments.rendering import RenderOnly
from renderer.errors import RequestError
from renderer.warmup import usual_image

if TYPE_CHECKING:
    from deployments.operations import Operations

logger = logging.getLogger("ray.serve.greenroom")

PATH = "/v1/chat/completions/render"
CHUNK = 64 * 1024
# The allocator settles on how it serves a size when that is freed and asked for again.
ROUNDS = 3


async def rehearse(operations: Operations) -> None:
    """Answer a few requests of the usual kinds. One that fails is logged, and a tier that never comes not awaited."""
    begun = time.perf_counter()
    app = FastAPI()
    app.include_router(render_routes(operations))
    add_error_handlers(app, {})
    with operations.record.unrecorded(), operations.front.backend.rehearsing():
        try:
            async with asyncio.timeout(operations.front.config.router.tier_wait_s):
                statuses = [await _answered(app, body) for body in _bodies()]
        except TimeoutError:
            statuses = [504]
    if max(statuses) >= 500:
        logger.warning("the rehearsal failed with status %d", max(statuses))
    operations.record.add_steps({"rehearsal": time.perf_counter() - begun})


async def rehearse_rendering(replica: RenderOnly) -> None:
    """The same for a replica behind a router: render-only answers as its tier gives them, written out."""
    begun = time.perf_counter()
    with replica.record.unrecorded():
        try:
            for call in _calls():
                await replica.render_answer(call)
        except RequestError as error:  # a model without a chat template, or too short for a picture
            logger.info("the rehearsal ended early: %s", error.message)
    replica.renderer.clear_mm_cache()
    replica.record.add_steps({"rehearsal": time.perf_counter() - begun})


def _bodies() -> Sequence[bytes]:
    """A text, and images that differ for every cache; with their tensors, and without."""
    image = usual_image()
    pictures = [_body(image + bytes([number])) for number in range(ROUNDS)]
    return [_body(None), *pictures, _body(image, mm_payload="none"), _body(None)]


def _calls() -> Sequence[RenderCall]:
    bodies = [parse(RenderChatBody, body) for body in _bodies()]
    envelope = Envelope("rehearsal")
    return [RenderCall(body.request(), body.sampling(), envelope, True, body.tensors) for body in bodies]


def _body(image: bytes | None, **options: str) -> bytes:
    return orjson.dumps({"messages": [user("What is this?", *([] if image is None else [image]))], **options})


async def _answered(app: FastAPI, body: bytes) -> int:
    """Send a body through the application in this process; return the status of the answer."""
    pieces = [body[start : start + CHUNK] for start in range(0, len(body), CHUNK)]
    messages = iter(
        {"type": "http.request", "body": piece, "more_body": place < len(pieces)}
        for place, piece in enumerate(pieces, 1)
    )
    statuses: list[int] = []

    async def receive() -> Message:
        message = next(messages, None)
        if message is None:
            await asyncio.Event().wait()  # a client that stays
        return message or {}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "http_version": "1.1", "scheme": "http", "method": "POST", "path": PATH,
        "raw_path": PATH.encode(), "query_string": b"", "root_path": "", "headers": headers, "client": None,
        "server": None,
    }  # fmt: skip
    with suppress(Exception):  # an error that has been answered is raised all the same
        await app(scope, receive, send)
    return statuses[0] if statuses else 500

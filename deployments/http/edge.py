"""What every HTTP request passes before its route and every answer after it: the key, the body's size, the headers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from deployments.error_response import error_response
from renderer.errors import BodyTooLargeError, RequestError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from deployments.http.auth import KeyRing

OPEN_PATHS = frozenset({"/health"})
# For how long the rest of a refused body is read and thrown away, and how long a pause ends that. A connection that is
# closed on a client that still sends is reset, and the reset can take the answer with it.
DRAIN_S = 10.0
PAUSE_S = 0.5


class Edge:
    """ASGI middleware around all routes, so that a new route is behind it without a word.

    Args:
        keys: None where anybody may ask.
        max_body_bytes: Of one request. A body that is announced as larger is refused unread, one that turns out to be
            is refused while it is read. Nothing of it is kept.
        headers: Put on every answer that lacks them, errors and refusals included.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, max_body_bytes: int, headers: Mapping[str, str]) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = self._completed(send)
        try:
            self._check(scope)
        except RequestError as error:
            if "expect" not in Headers(scope=scope):  # such a client sends nothing before it is told to
                await drain(receive)
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _check(self, scope: Scope) -> None:
        """Raise what the request is refused with, before anything of its body is read."""
        headers = Headers(scope=scope)
        if self._keys is not None and route_path(scope) not in OPEN_PATHS:
            self._keys.check(headers.get("authorization"))
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body_bytes:
                if message.get("more_body"):
                    await drain(receive)
                raise self._too_large()
            return message

        return limited

    def _completed(self, send: Send) -> Send:
        begun = time.perf_counter()

        async def completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                headers.setdefault("Server-Timing", f"total;dur={(time.perf_counter() - begun) * 1000:.2f}")
            await send(message)

        return completed

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body has more than {self._max_body_bytes} bytes")


async def drain(receive: Receive) -> None:
    """Read the rest of a body for nothing, until it ends or pauses, its client leaves or `DRAIN_S` seconds are over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while (await asyncio.wait_for(receive(), PAUSE_S)).get("more_body"):
                pass


def route_path(scope: Scope) -> str:
    """The path below the application's own prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))

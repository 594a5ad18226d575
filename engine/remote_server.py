"""The servers of a remote engine: which one takes a request, and what is known of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from engine.remote_config import RemoteEngineConfig
from engine.remote_wire import server_error
from renderer.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineStartingError,
    GreenroomError,
    OverloadedError,
)

GENERATE = "/inference/v1/generate"
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
# How long a server that has answered counts as well without being asked.
_FRESH_S = 1.0


@dataclass(slots=True, eq=False)
class Server:
    """One base URL.

    Attributes:
        in_flight: Requests under way there.
        last_used: Of all turns of the pool, its last one.
    """

    url: str
    in_flight: int = 0
    last_used: int = 0
    _pause_s: float = field(default=0.0, repr=False)
    _down_until: float = field(default=0.0, repr=False)
    _well_until: float = field(default=0.0, repr=False)

    @property
    def is_up(self) -> bool:
        """Whether it may be tried: nothing is known against it, or its pause is over."""
        return time.monotonic() >= self._down_until

    @property
    def is_fresh(self) -> bool:
        """Whether it has answered a moment ago."""
        return time.monotonic() < self._well_until

    def failed(self) -> None:
        """Leave it alone for a while, longer each time."""
        self._well_until = 0.0
        self._pause_s = min(max(_FIRST_PAUSE_S, 2 * self._pause_s), _LONGEST_PAUSE_S)
        self._down_until = time.monotonic() + self._pause_s

    def answered(self) -> None:
        self._pause_s = self._down_until = 0.0
        self._well_until = time.monotonic() + _FRESH_S


class ServerPool:
    """All servers, and the HTTP client that talks to them."""

    def __init__(self, config: RemoteEngineConfig) -> None:
        self.servers: Sequence[Server] = tuple(map(Server, config.urls))
        self._config = config
        self._client = _client(config)
        self._turns = 0

    def in_order(self) -> Sequence[Server]:
        """The servers as they are tried: the one with the least under way first, of equals the one that has waited
        longest for its turn; those that are down come last.
        """
        return sorted(self.servers, key=lambda server: (not server.is_up, server.in_flight, server.last_used))

    @contextmanager
    def turn(self, server: Server) -> Iterator[None]:
        """Count a request as under way."""
        self._turns += 1
        server.last_used = self._turns
        server.in_flight += 1
        try:
            yield
        finally:
            server.in_flight -= 1

    async def open(self, body: bytes) -> tuple[Server, httpx.Response]:
        """Send a generate request to the first server that takes it; the head of its answer has arrived.

        Raises:
            EngineStartingError: None could be reached.
            GreenroomError: One refuses it.
        """
        overloaded: OverloadedError | None = None
        for server in self.in_order():
            try:
                response = await self._send(server, body)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                server.failed()
                continue
            except httpx.HTTPError as error:
                raise self.lost(server) from error
            if response.status_code == httpx.codes.OK:
                server.answered()
                return server, response
            refusal = await self.judged(server, await _refusal(response))
            if isinstance(refusal, OverloadedError):
                overloaded = refusal
            elif not isinstance(refusal, EngineDeadError):
                raise refusal
        raise overloaded or EngineStartingError("no server of the remote engine can be reached")

    def lost(self, server: Server) -> EngineDeadError:
        """The connection to a server broke in the middle of a request."""
        server.failed()
        return EngineDeadError("the connection to the server was lost")

    async def judged(self, server: Server, error: GreenroomError) -> GreenroomError:
        """A server's failure: of this request, or, where the server is not well, of the server."""
        is_failure = isinstance(error, (EngineError, OverloadedError))
        if is_failure and not await self.is_well(server):
            server.failed()
            return EngineDeadError(error.message)
        return error

    async def any_is_well(self) -> bool:
        """Asks them all at once, and waits for the first that is."""
        if any(server.is_fresh for server in self.servers):
            return True
        asked = [asyncio.create_task(self.is_well(server)) for server in self.servers]
        try:
            for answer in asyncio.as_completed(asked):
                if await answer:
                    return True
            return False
        finally:
            for task in asked:
                task.cancel()

    async def is_well(self, server: Server) -> bool:
        try:
            answer = await self._client.get(server.url + "/health", timeout=self._config.connect_timeout_s)
        except httpx.HTTPError:
            return False
        if answer.status_code == httpx.codes.OK:
            server.answered()
            return True
        return False

    async def post(self, server: Server, path: str, body: Any) -> int:
        """The status of an answer.

        Raises:
            EngineDeadError: There is none.
        """
        try:
            return (await self._client.post(server.url + path, json=body)).status_code
        except httpx.HTTPError as error:
            raise self.lost(server) from error

    async def max_model_len(self) -> int | None:
        """Tokens that every server which is up holds for a request; None where none is.

        Raises:
            ConfigError: One is up and of no use.
        """
        answers = await asyncio.gather(*map(self._limit, self.servers))
        return min((limit for limit in answers if limit is not None), default=None)

    async def close(self) -> None:
        await self._client.aclose()

    async def _send(self, server: Server, body: bytes) -> httpx.Response:
        request = self._client.build_request("POST", server.url + GENERATE, content=body)
        return await self._client.send(request, stream=True)

    async def _limit(self, server: Server) -> int | None:
        try:
            models = await self._client.get(server.url + "/v1/models")
            probe = await self._client.post(server.url + GENERATE, content=b"{}")
        except httpx.HTTPError:
            return None
        if models.status_code in (401, 403):
            raise ConfigError(f"{server.url} wants another API key", "api_key")
        if probe.status_code in (403, 404, 405):
            raise ConfigError(f"{server.url} does not take generate requests: start it with --enable-scale-out", "urls")
        if models.status_code != httpx.codes.OK:
            return None
        return _limit_of(models.json()["data"], server.url, self._config.served_model_name)


async def _refusal(response: httpx.Response) -> GreenroomError:
    try:
        body = orjson.loads(await response.aread())
    except (httpx.HTTPError, ValueError):
        body = None
    finally:
        await response.aclose()
    return server_error(response.status_code, body)


def _client(config: RemoteEngineConfig) -> httpx.AsyncClient:
    headers = {"Content-Type": "application/json"}
    if config.api_key is not None:
        headers["Authorization"] = f"Bearer {config.api_key.get_secret_value()}"
    timeout = httpx.Timeout(config.read_timeout_s, connect=config.connect_timeout_s, pool=None)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=config.max_num_seqs)
    return httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=False)


def _limit_of(models: Sequence[dict[str, Any]], url: str, name: str | None) -> int:
    known = {model["id"]: model for model in models}
    if name is not None and name not in known:
        raise ConfigError(f"{url} serves {', '.join(known)}, not {name}", "served_model_name")
    model = models[0] if name is None else known[name]
    return int(model["max_model_len"])

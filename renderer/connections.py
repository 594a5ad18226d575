"""HTTP connections to addresses that the rules permit, and to no others.

The connections are httpcore's; the pool is not. httpcore's own pool loses a connection for good when a request is
cancelled in the wrong moment, and here requests are cancelled whenever a client goes away.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any
from weakref import WeakSet

import httpcore
import httpx

from renderer.addresses import IPAddress, parse_address
from renderer.fetch_config import FetchConfig

logger = logging.getLogger("greenroom.fetch")

Resolver = Callable[[str], Sequence[str]]
"""Host name to addresses, best first. Runs in a thread and may block; raises OSError where there is none."""

MAX_ADDRESSES = 4  # of one host that are tried in turn


class ForbiddenAddressError(Exception):
    """The host has addresses, and none that may be connected to."""


class Connections:
    """A pool of HTTP/1.1 connections. One event loop owns it.

    A name is looked up once for each connection, and the connection goes to the very address that was checked: a name
    server that answers otherwise the next time changes nothing. Host header and TLS server name stay those of the URL.
    How many are in use at a time is the caller's to limit.

    Args:
        config: The rules.
        resolve: How host names are looked up.
        threads: Where they are.
    """

    def __init__(self, config: FetchConfig, resolve: Resolver, threads: Executor) -> None:
        self._rules = config.address_rules
        self._connect_s = config.connect_s
        self._keepalive_s = config.keepalive_s
        self._most_idle = config.max_fetches
        self._tls = _tls_context(config.ca_file)
        self._resolve = resolve
        self._threads = threads
        self._idle: list[httpcore.AsyncHTTP11Connection] = []  # the longest unused first
        self._streams: WeakSet[_Stream] = WeakSet()

    @asynccontextmanager
    async def borrow(self, origin: httpcore.Origin) -> AsyncIterator[httpcore.AsyncHTTP11Connection]:
        """A connection for one request. It is kept for the next one if it has read the whole answer by then.

        Raises:
            ForbiddenAddressError: The host may not be connected to.
            OSError: It cannot be; ssl.SSLError where TLS fails, TimeoutError after `connect_s`.
        """
        connection = await self._take_idle(origin) or await self._open(origin)
        try:
            yield connection
        finally:
            if connection.is_idle():
                self._idle.append(connection)
            else:
                await connection.aclose()
            while len(self._idle) > self._most_idle:
                await self._idle.pop(0).aclose()

    def close(self) -> None:
        """Closes all connections, those in use included."""
        self._most_idle = 0
        self._idle.clear()
        for stream in list(self._streams):
            stream.abort()

    async def aclose(self) -> None:
        """`close`, and wait until they are gone."""
        streams = list(self._streams)
        self.close()
        await asyncio.gather(*(stream.closed() for stream in streams))

    async def _take_idle(self, origin: httpcore.Origin) -> httpcore.AsyncHTTP11Connection | None:
        """The connection to `origin` that was used last, if one is left; closes those that have waited too long."""
        kept: list[httpcore.AsyncHTTP11Connection] = []
        for connection in self._idle:
            if connection.has_expired():
                await connection.aclose()
            else:
                kept.append(connection)
        found = next((connection for connection in reversed(kept) if connection.can_handle_request(origin)), None)
        self._idle = [connection for connection in kept if connection is not found]
        return found

    async def _open(self, origin: httpcore.Origin) -> httpcore.AsyncHTTP11Connection:
        until = asyncio.get_running_loop().time() + self._connect_s
        host = origin.host.decode("ascii")
        async with asyncio.timeout_at(until):
            stream = await self._connect(await self._addresses(host), origin, until)
        self._streams.add(stream)
        return httpcore.AsyncHTTP11Connection(origin, stream, self._keepalive_s)

    async def _addresses(self, host: str) -> list[IPAddress]:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._resolve, host)
        addresses = [parse_address(text) for text in found]
        permitted = [address for address in addresses if self._rules.permits(host, address)]
        if addresses and not permitted:
            logger.info("host %r may not be connected to: %s", host, ", ".join(map(str, addresses)))
            raise ForbiddenAddressError
        return _families_in_turn(permitted)[:MAX_ADDRESSES]

    async def _connect(self, addresses: Sequence[IPAddress], origin: httpcore.Origin, until: float) -> _Stream:
        """Tries each address for its share of the time until `until`, in the loop's seconds."""
        failure = OSError("no address")
        for remaining, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            share = (until - asyncio.get_running_loop().time()) / remaining
            try:
                async with asyncio.timeout(share):
                    return _Stream(*await self._connect_to(address, origin))
            except OSError as error:
                failure = error
        raise failure

    async def _connect_to(
        self, address: IPAddress, origin: httpcore.Origin
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if origin.scheme == b"http":
            return await asyncio.open_connection(str(address), origin.port)
        name = origin.host.decode("ascii").rstrip(".")
        return await asyncio.open_connection(str(address), origin.port, ssl=self._tls, server_hostname=name)


class _Stream(httpcore.AsyncNetworkStream):
    """An asyncio connection as httpcore sees it. Closing never waits, so that nothing can keep it from happening."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's signature
        try:
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore's signature
        try:
            async with asyncio.timeout(timeout):
                self._writer.write(buffer)
                await self._writer.drain()
        except OSError as error:
            raise httpcore.WriteError from error  # an answer may have come all the same: httpcore looks

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._writer.transport.abort()

    async def closed(self) -> None:
        """Waits until the connection is gone."""
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # asked of an idle connection: whether the host has closed it
            return self._reader.at_eof() or self._writer.is_closing()
        return self._writer.get_extra_info(info)


def system_addresses(host: str) -> list[str]:
    """The operating system's `Resolver`: name servers, the hosts file, and any spelling of an address that it takes."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _families_in_turn(addresses: Sequence[IPAddress]) -> list[IPAddress]:
    """The addresses with IPv4 and IPv6 alternating, so that a family that leads nowhere costs one try, not all."""
    first = [address for address in addresses if address.version == addresses[0].version]
    second = [address for address in addresses if address.version != addresses[0].version]
    return [address for address in chain.from_iterable(zip_longest(first, second)) if address is not None]


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Trusts certifi's certificates and those of `ca_file`; the environment adds none."""
    context = httpx.create_ssl_context(trust_env=False)
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context

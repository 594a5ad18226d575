"""One item over HTTP, within limits of addresses, bytes, time and redirects.

HTTP is spoken through httpcore's connections, below what an httpx client adds: there are no cookies, no proxies from
the environment, and no redirects, credentials or decompression but those written here.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import httpcore
import httpx

from renderer.addresses import host_matches
from renderer.connections import Connections, ForbiddenAddressError, Resolver
from renderer.errors import MediaError, MediaForbiddenError, MediaUnreachableError
from renderer.fetch_config import FetchConfig

DEFAULT_PORTS = {"http": 80, "https": 443}
REDIRECTS = frozenset({301, 302, 303, 307, 308})
HOST_NAME = re.compile(r"(?=.{1,254}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


class ItemFailure(Exception):
    """Why an item is not fetched: the error to come, less the item's index, which only the fetcher knows."""

    def __init__(self, kind: type[MediaError], message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class TransientFailure(ItemFailure):
    """One that another try may mend."""

    def __init__(self, message: str) -> None:
        super().__init__(MediaUnreachableError, message)


class Allowance:
    """The bytes that may still be taken: by the items of one request together, and by all requests at a time.

    Args:
        total: In bytes.
        exceeded: Makes what is raised beyond them.
        within: An allowance that what is taken here is taken of as well.
    """

    def __init__(self, total: int, exceeded: Callable[[], Exception], within: Allowance | None = None) -> None:
        self._left = total
        self._taken = 0
        self._exceeded = exceeded
        self._within = within

    def take(self, size: int) -> None:
        if size > self._left:
            raise self._exceeded()
        if self._within is not None:
            self._within.take(size)
        self._left -= size
        self._taken += size

    def give_back(self, size: int) -> None:
        self._left += size
        self._taken -= size
        if self._within is not None:
            self._within.give_back(size)

    def give_all_back(self) -> None:
        self.give_back(self._taken)


class Downloader:
    """Gets `http:` and `https:` URLs through one connection pool. One event loop owns it.

    Args:
        config: The rules.
        max_bytes: Of one item, as sent and as decompressed.
        resolve: How host names are looked up.
        threads: Where they are, and where bodies are decompressed.
    """

    def __init__(self, config: FetchConfig, max_bytes: int, resolve: Resolver, threads: Executor) -> None:
        self._config = config
        self._max_bytes = max_bytes
        self._threads = threads
        self._connections = Connections(config, resolve, threads)

    async def download(self, url: httpx.URL, allowance: Allowance) -> bytes:
        """The body of the first answer that is neither a redirect nor a passing failure.

        Raises:
            ItemFailure: There is none, or it may not be had.
        """
        redirects = tries = 0
        while True:
            self._check(url)
            try:
                answer = await self._request(url, allowance)
            except TransientFailure:
                tries += 1
                if tries > self._config.retries:
                    raise
                await asyncio.sleep(self._config.backoff_s * 2 ** (tries - 1))
                continue
            if isinstance(answer, bytes):
                return answer
            redirects += 1
            if redirects > self._config.max_redirects:
                raise ItemFailure(MediaUnreachableError, f"more than {self._config.max_redirects} redirects")
            url = answer

    def close(self) -> None:
        """Closes all connections. What is under way fails."""
        self._connections.close()

    async def aclose(self) -> None:
        """`close`, and wait until they are gone."""
        await self._connections.aclose()

    def _check(self, url: httpx.URL) -> None:
        """Refuses a URL for what it says; where it leads is checked when it is connected to."""
        config = self._config
        if url.scheme not in config.schemes:
            raise ItemFailure(MediaForbiddenError, "URLs of its scheme may not be fetched")
        if url.userinfo:
            raise ItemFailure(MediaForbiddenError, "a URL may not carry a user name or a password")
        host = url.raw_host.decode("ascii")
        port = DEFAULT_PORTS[url.scheme] if url.port is None else url.port
        if not (":" in host or HOST_NAME.fullmatch(host)) or not 0 < port < 65536:  # ":": an IPv6 address, parsed
            raise ItemFailure(MediaError, "not a valid URL")
        if config.ports is not None and port not in config.ports:
            raise ItemFailure(MediaForbiddenError, "its port may not be connected to")
        if config.hosts is not None and not host_matches(host, config.hosts):
            raise ItemFailure(MediaForbiddenError, "its host may not be fetched from")

    async def _request(self, url: httpx.URL, allowance: Allowance) -> bytes | httpx.URL:
        """The body of one answer, or where it redirects to."""
        request = self._asking_for(url)
        with _transport_failures():
            async with self._connections.borrow(request.url.origin) as connection:
                response = await connection.handle_async_request(request)
                try:
                    if response.status in REDIRECTS:
                        return _redirected(url, response)
                    _check_status(response.status)
                    return await self._read_body(response, allowance)
                finally:
                    await response.aclose()

    def _asking_for(self, url: httpx.URL) -> httpcore.Request:
        return httpcore.Request(
            "GET",
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=[
                ("Host", url.netloc),
                ("Accept", "image/*,*/*;q=0.1"),
                ("Accept-Encoding", "identity"),
                ("User-Agent", self._config.user_agent),
            ],
            extensions={"timeout": {"read": self._config.idle_s, "write": self._config.idle_s}},
        )

    async def _read_body(self, response: httpcore.Response, allowance: Allowance) -> bytes:
        """The body, decompressed. Stops at the first piece beyond a limit, whatever the headers declare."""
        headers = httpx.Headers(response.headers)
        limit = self._max_bytes
        sent = _Meter(self._config, limit)
        sent.check(int(headers.get("content-length", 0)))
        decompress = _decompressor(headers.get("content-encoding", "identity").strip().lower())
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in response.aiter_stream():
                sent.count(piece)
                plain = piece if decompress is None else await self._in_thread(decompress, piece, limit - size + 1)
                sent.check(size + len(plain))
                allowance.take(len(plain))
                size += len(plain)
                pieces.append(plain)
        except BaseException:
            allowance.give_back(size)
            raise
        return b"".join(pieces)

    async def _in_thread(self, decompress: Callable[[bytes, int], bytes], piece: bytes, limit: int) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._threads, decompress, piece, limit)


class _Meter:
    """Holds a body to the limits of bytes and pace while it comes in."""

    def __init__(self, config: FetchConfig, max_bytes: int) -> None:
        self._config = config
        self._max_bytes = max_bytes
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._sent = 0

    def count(self, piece: bytes) -> None:
        self._sent += len(piece)
        self.check(self._sent)
        elapsed = self._clock() - self._began
        if elapsed > self._config.idle_s and self._sent < elapsed * self._config.min_bytes_per_s:
            raise ItemFailure(MediaUnreachableError, "its host sends it too slowly")

    def check(self, size: int) -> None:
        if size > self._max_bytes:
            raise ItemFailure(MediaUnreachableError, f"it exceeds {self._max_bytes} bytes")


def _check_status(status: int) -> None:
    if status >= 500:
        raise TransientFailure(f"its host answered with status {status}")
    if not 200 <= status < 300:
        raise ItemFailure(MediaUnreachableError, f"its host answered with status {status}")


def _redirected(url: httpx.URL, response: httpcore.Response) -> httpx.URL:
    """Where a redirect leads, of any scheme and host: it is checked like the request's own URL."""
    try:
        return url.join(httpx.Headers(response.headers).get("location"))
    except (httpx.InvalidURL, TypeError, ValueError) as error:  # TypeError: no such header
        raise ItemFailure(MediaUnreachableError, "its host redirects to no valid URL") from error


def _decompressor(encoding: str) -> Callable[[bytes, int], bytes] | None:
    """What undoes a `Content-Encoding`, given a piece and the most bytes to make of it; None: there is nothing to undo.

    None is asked for, but some hosts send files as they store them.
    """
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress  # 32: takes gzip's header and zlib's
    raise ItemFailure(MediaUnreachableError, "its host sends it in an encoding that is not understood")


@contextmanager
def _transport_failures() -> Iterator[None]:
    """The one translation of what goes wrong below. Texts of the network stay out of the messages."""
    try:
        yield
    except ForbiddenAddressError as error:
        raise ItemFailure(MediaForbiddenError, "its host may not be connected to") from error
    except ssl.SSLError as error:
        raise ItemFailure(MediaUnreachableError, "its host offers no TLS connection to be trusted") from error
    except TimeoutError as error:
        raise TransientFailure("its host cannot be connected to in time") from error
    except httpcore.TimeoutException as error:
        raise ItemFailure(MediaUnreachableError, "its host does not answer in time") from error
    except zlib.error as error:
        raise ItemFailure(MediaUnreachableError, "what its host sends cannot be decompressed") from error
    except (OSError, httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise TransientFailure("its host cannot be connected to, or breaks off") from error

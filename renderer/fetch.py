"""Media addresses to bytes, without becoming a way into the network that the server stands in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpx

from renderer.connections import Resolver, system_addresses
from renderer.download import Allowance, Downloader, ItemFailure
from renderer.errors import MediaError, MediaForbiddenError, MediaUnreachableError, OverloadedError
from renderer.fetch_config import FetchConfig
from renderer.local_files import ForbiddenFileError, read_below, size_below

logger = logging.getLogger("greenroom.fetch")


class MediaFetcher:
    """Fetches what `http:`, `https:` and `file:` URLs name, within the rules of a `FetchConfig`.

    One event loop owns it: that of the first call. All requests share its connection pool and its limit of fetches.
    What is fetched need not be an image; the decoder finds out.

    Args:
        config: The rules.
        max_bytes: Of one item, as sent and as decompressed.
        resolve: How host names are looked up.
    """

    def __init__(self, config: FetchConfig, max_bytes: int, resolve: Resolver = system_addresses) -> None:
        self._config = config
        self._max_bytes = max_bytes
        self._slots = asyncio.Semaphore(config.max_fetches)
        self._held = Allowance(config.max_held_bytes, _too_much_held)
        # Threads of its own: name servers and file systems that hang keep nothing waiting but fetches.
        self._threads = ThreadPoolExecutor(config.max_fetches, thread_name_prefix="greenroom-fetch")
        self._downloader = Downloader(config, max_bytes, resolve, self._threads)

    async def fetch(self, url: str, index: int) -> bytes:
        """The bytes that `url` names, at most `max_bytes` of them.

        Args:
            url: `http:`, `https:` or `file:`.
            index: The item's position in its request, for the error.

        Raises:
            MediaForbiddenError, MediaUnreachableError, MediaError, OverloadedError: See `fetched`.
        """
        async with self.fetched({index: url}) as data:
            return data[index]

    @asynccontextmanager
    async def fetched(self, urls: Mapping[int, str]) -> AsyncIterator[dict[int, bytes]]:
        """The bytes of all items of one request, by position. The first failure ends the fetching of the others.

        Args:
            urls: By the item's position in its request. What occurs twice is fetched once.

        Raises:
            MediaForbiddenError: The rules do not let an item be fetched.
            MediaUnreachableError: There is no answer, or an error, or it comes too slowly, or is too large, by itself
                or together with the request's other items.
            MediaError: It is not a valid URL.
            OverloadedError: Its turn does not come within `total_s`, or requests that are not through (they are once
                they leave this context) hold `max_held_bytes`.
        """
        allowance = Allowance(self._config.max_request_bytes, self._request_too_large, within=self._held)
        try:
            yield await self._fetch_all(urls, allowance)
        finally:
            allowance.give_all_back()

    def close(self) -> None:
        """Closes all connections. What is under way fails; waiting for it first is the caller's part."""
        self._downloader.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def aclose(self) -> None:
        """`close`, and wait until the connections are gone."""
        await self._downloader.aclose()
        self.close()

    def _request_too_large(self) -> ItemFailure:
        limit = self._config.max_request_bytes
        return ItemFailure(MediaUnreachableError, f"the request's items together exceed {limit} bytes")

    async def _fetch_all(self, urls: Mapping[int, str], allowance: Allowance) -> dict[int, bytes]:
        lanes = asyncio.Semaphore(self._config.max_fetches_per_request)

        async def fetch_in_lane(url: str, index: int) -> bytes:
            async with lanes:
                return await self._fetch(url, index, allowance)

        tasks: dict[str, asyncio.Task[bytes]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for index, url in urls.items():
                    if url not in tasks:
                        tasks[url] = group.create_task(fetch_in_lane(url, index))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return {index: tasks[url].result() for index, url in urls.items()}

    async def _fetch(self, url: str, index: int, allowance: Allowance) -> bytes:
        total_s = self._config.total_s
        async with self._slot():
            try:
                async with asyncio.timeout(total_s):
                    return await self._read(_parse(url), allowance)
            except TimeoutError:
                raise MediaUnreachableError(f"it takes longer than {total_s:g} seconds", index) from None
            except ItemFailure as failure:
                logger.info("image %d is not fetched: %s (%r)", index, failure.message, failure.__cause__)
                raise failure.kind(failure.message, index) from None

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._config.total_s):
                await self._slots.acquire()
        except TimeoutError:
            raise OverloadedError("too many media items are being fetched") from None
        try:
            yield
        finally:
            self._slots.release()

    async def _read(self, url: httpx.URL, allowance: Allowance) -> bytes:
        if url.scheme == "file":
            return await self._read_file(url, allowance)
        return await self._downloader.download(url, allowance)

    async def _read_file(self, url: httpx.URL, allowance: Allowance) -> bytes:
        root, limit = self._config.file_root, self._max_bytes
        if root is None:
            raise ItemFailure(MediaForbiddenError, "file: URLs may not be read here")
        if url.netloc or url.userinfo:
            raise ItemFailure(MediaForbiddenError, "a file: URL may not name a host")
        loop = asyncio.get_running_loop()
        try:
            size = await loop.run_in_executor(self._threads, size_below, root, url.path)
            if size > limit:
                raise ItemFailure(MediaUnreachableError, f"it exceeds {limit} bytes")
            allowance.take(size)
            data = await loop.run_in_executor(self._threads, read_below, root, url.path, size + 1)
        except ForbiddenFileError as error:
            raise ItemFailure(MediaForbiddenError, "its file may not be read") from error
        except OSError as error:
            raise ItemFailure(MediaUnreachableError, "its file cannot be read") from error
        if len(data) > size:
            raise ItemFailure(MediaUnreachableError, "its file grew while it was read")
        allowance.give_back(size - len(data))
        return data


def _too_much_held() -> OverloadedError:
    return OverloadedError("too much is held of what requests have fetched")


def _parse(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise ItemFailure(MediaError, "not a valid URL") from error

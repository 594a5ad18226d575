"""Fetching against a real server that does everything wrong, on loopback; names are looked up in a table of the test's.

`images.test` leads to the server and is allow-listed; whatever else leads to it must not be connected to.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import pickle
import re
import socket
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from renderer.connections import system_addresses
from renderer.errors import MediaError, MediaForbiddenError, MediaUnreachableError, OverloadedError
from renderer.fetch import MediaFetcher
from renderer.fetch_config import FetchConfig
from tests.renderer.hostile_server import (
    OK,
    UNTIL_CLOSED,
    HostileServer,
    Script,
    answer,
    certificate,
    drip,
    endless,
    in_turn,
    raw,
    redirect,
    serving,
    stall,
)

MIB = 1024 * 1024
PICTURE = bytes(range(256)) * 16


class Names:
    """A name server of fixed answers, one after the other for one name; the system's for every other."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): list(lists) for name, lists in answers.items()}
        self.asked: list[str] = []

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        lists = self.answers.get(host)
        if lists is None:
            return system_addresses(host)
        return lists.pop(0) if len(lists) > 1 else lists[0]


@asynccontextmanager
async def fetching(
    resolve: Callable[[str], list[str]] | None = None, max_bytes: int = 32 * MIB, **settings: Any
) -> AsyncIterator[MediaFetcher]:
    defaults = {"internal_hosts": ("images.test",), "backoff_s": 0.0, "total_s": 10.0}
    names = Names(images_test=[["127.0.0.1"]])
    fetcher = MediaFetcher(FetchConfig(**{**defaults, **settings}), max_bytes, resolve or names)
    try:
        yield fetcher
    finally:
        await fetcher.aclose()


async def fetch_all(fetcher: MediaFetcher, urls: Mapping[int, str]) -> dict[int, bytes]:
    async with fetcher.fetched(urls) as data:
        return data


async def refusal(fetcher: MediaFetcher, url: str, kind: type[MediaError], index: int = 3) -> str:
    """The message of the error that fetching must end with, proven to hold nothing that the client did not send."""
    with pytest.raises(kind) as caught:
        await fetcher.fetch(url, index)
    error = caught.value
    assert type(error) is kind
    assert error.index == index
    assert error.__suppress_context__
    assert not re.search(r"\d+\.\d+\.\d+|::|Errno|secret|/tmp|\.test", str(error))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error.message


async def refusal_from(
    script: Script | Mapping[str, Script], kind: type[MediaError] = MediaUnreachableError, **settings: Any
) -> tuple[str, HostileServer]:
    """The message for a script (at `/`), and the server as the fetch left it."""
    scripts = script if isinstance(script, Mapping) else {"/": script}
    async with serving(scripts) as server, fetching(**settings) as fetcher:
        message = await refusal(fetcher, server.url("/"), kind)
    return message, server


def open_sockets() -> int:
    """Of this process, the server's ends included."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(link.startswith("socket:") for link in links)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing tells when a descriptor is closed
            await asyncio.sleep(0.002)


# What is sent, and what comes back


async def test_the_bytes_of_an_answer_are_returned() -> None:
    async with serving({"/a.png?x=%C3%BC": answer(PICTURE)}) as server, fetching() as fetcher:
        assert await fetcher.fetch(server.url("/a.png?x=ü#fragment"), 0) == PICTURE


async def test_a_request_carries_its_host_and_nothing_of_the_server_that_sends_it() -> None:
    async with serving({"/": answer(PICTURE)}) as server, fetching(user_agent="picture bot/1") as fetcher:
        await fetcher.fetch(server.url("/"), 0)
    assert server.requests[0].headers == {
        "host": f"images.test:{server.port}",
        "accept": "image/*,*/*;q=0.1",
        "accept-encoding": "identity",
        "user-agent": "picture bot/1",
    }


async def test_connections_are_kept_and_shared() -> None:
    async with serving({"/": answer(PICTURE)}) as server, fetching() as fetcher:
        for index in range(3):
            await fetcher.fetch(server.url("/"), index)
        await fetch_all(fetcher, {0: server.url("/")})
    assert server.connections == 1


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with serving({"/": answer(PICTURE)}) as server, fetching() as fetcher:
        assert await fetcher.fetch(server.url("/"), 0) == PICTURE


async def test_an_international_host_is_looked_up_and_named_in_its_ascii_form() -> None:
    names = Names(**{"xn--bcher-kva_test": [["127.0.0.1"]]})
    async with serving({"/": answer(PICTURE)}) as server, fetching(names, internal_hosts=(".test",)) as fetcher:
        assert await fetcher.fetch(server.url("/", "BÜCHER.test"), 0) == PICTURE
    assert names.asked == ["xn--bcher-kva.test"]
    assert server.requests[0].headers["host"] == f"xn--bcher-kva.test:{server.port}"


async def test_an_ipv6_literal_keeps_its_brackets_in_the_host_header() -> None:
    settings: dict[str, Any] = {"internal_networks": ("127.0.0.1/32",)}
    async with serving({"/": answer(PICTURE)}) as server, fetching(**settings) as fetcher:
        assert await fetcher.fetch(server.url("/", "[::ffff:127.0.0.1]"), 0) == PICTURE
    assert server.requests[0].headers["host"] == f"[::ffff:127.0.0.1]:{server.port}"


# Addresses


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.0.0.2",
        "0",
        "0.0.0.0",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0x7F.0x0.0x0.0x1",
        "017700000001",
        "0177.1",
        "localhost",
        "LOCALHOST",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b:1::127.0.0.1]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "169.254.169.254",
        "2852039166",
        "10.0.0.1",
        "100.64.0.1",
        "224.0.0.1",
    ],
)
async def test_an_address_that_is_not_public_is_forbidden_in_every_spelling(host: str) -> None:
    async with serving({"/": answer(PICTURE)}) as server, fetching() as fetcher:
        await refusal(fetcher, server.url("/", host), MediaForbiddenError)
    assert server.connections == 0


async def test_a_name_that_leads_to_a_private_address_is_forbidden() -> None:
    names = Names(evil_test=[["127.0.0.1"]], nat_test=[["64:ff9b::7f00:1", "::ffff:127.0.0.1"]])
    async with serving({"/": answer(PICTURE)}) as server, fetching(names) as fetcher:
        await refusal(fetcher, server.url("/", "evil.test"), MediaForbiddenError)
        await refusal(fetcher, server.url("/", "nat.test"), MediaForbiddenError)
    assert server.connections == 0


async def test_an_internal_host_may_not_lead_to_a_metadata_service() -> None:
    async with fetching(Names(images_test=[["169.254.169.254"]])) as fetcher:
        await refusal(fetcher, "http://images.test/latest/meta-data/", MediaForbiddenError)


async def test_only_the_permitted_addresses_of_a_host_are_connected_to() -> None:
    names = Names(mixed_test=[["127.0.0.2", "127.0.0.1"]])
    settings: dict[str, Any] = {"internal_networks": ("127.0.0.1/32",)}
    async with (
        serving({"/": answer(PICTURE)}) as server,
        serving({}, "127.0.0.2", server.port) as victim,
        fetching(names, **settings) as fetcher,
    ):
        assert await fetcher.fetch(server.url("/", "mixed.test"), 0) == PICTURE
    assert victim.connections == 0


async def test_a_denied_network_beats_every_allowance() -> None:
    settings: dict[str, Any] = {"internal_networks": ("127.0.0.0/8",), "denied_networks": ("127.0.0.1/32",)}
    async with serving({"/": answer(PICTURE)}) as server, fetching(**settings) as fetcher:
        await refusal(fetcher, server.url("/"), MediaForbiddenError)
    assert server.connections == 0


async def test_a_name_that_is_rebound_leads_only_where_it_was_checked() -> None:
    names = Names(rebind_test=[["127.0.0.1"], ["127.0.0.2"]])
    settings: dict[str, Any] = {"internal_networks": ("127.0.0.1/32",), "keepalive_s": 0.0}
    async with (
        serving({"/": answer(PICTURE)}) as server,
        serving({"/": answer(b"secret")}, "127.0.0.2", server.port) as victim,
        fetching(names, **settings) as fetcher,
    ):
        url = server.url("/", "rebind.test")
        assert await fetcher.fetch(url, 0) == PICTURE
        assert names.asked == ["rebind.test"]
        await refusal(fetcher, url, MediaForbiddenError)
    assert names.asked == ["rebind.test"] * 2
    assert victim.connections == 0


@pytest.mark.parametrize("first", [raw(b"", close=True), answer(b"", 503), redirect("/", connection="close")])
async def test_a_name_that_is_rebound_before_a_retry_or_a_redirect_is_checked_again(first: Script) -> None:
    names = Names(rebind_test=[["127.0.0.1"], ["127.0.0.2"]])
    settings: dict[str, Any] = {"internal_networks": ("127.0.0.1/32",), "keepalive_s": 0.0}
    async with (
        serving({"/": first}) as server,
        serving({"/": answer(b"secret")}, "127.0.0.2", server.port) as victim,
        fetching(names, **settings) as fetcher,
    ):
        await refusal(fetcher, server.url("/", "rebind.test"), MediaForbiddenError)
    assert (server.connections, victim.connections) == (1, 0)


async def test_the_next_address_of_a_host_is_tried_when_one_refuses() -> None:
    names = Names(images_test=[["127.0.0.3", "127.0.0.2", "127.0.0.1"]])
    async with serving({"/": answer(PICTURE)}) as server, fetching(names, retries=0) as fetcher:
        assert await fetcher.fetch(server.url("/"), 0) == PICTURE


async def test_a_host_without_an_address_is_unreachable() -> None:
    def nowhere(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, f"secret name server says no to {host}")

    async with fetching(nowhere) as fetcher:
        await refusal(fetcher, "http://images.test/", MediaUnreachableError)
    async with fetching(lambda _: []) as fetcher:
        await refusal(fetcher, "http://images.test/", MediaUnreachableError)


async def test_the_cause_is_logged_for_the_operator(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "greenroom.fetch")
    async with fetching(Names(evil_test=[["10.1.2.3"]])) as fetcher:
        await refusal(fetcher, "http://evil.test/?signature=abc", MediaForbiddenError)
    assert "'evil.test' may not be connected to: 10.1.2.3" in caplog.text
    assert "image 3 is not fetched" in caplog.text
    assert "signature" not in caplog.text


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///picture.png",
        "http:picture.png",
        "http://images.test:0/",
        "http://images.test:65536/",
        "http://images.test:-1/",
        "http://images.test:8 0/",
        "http://images.test:eighty/",
        "http://0177.0.0.1/",
        "http://256.0.0.1/",
        "http://[::1/",
        "http://[127.0.0.1]/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://①②⑦.0.0.1/",
        "http://images.test/\r\nHost: evil",
        "http://images.test/\x00",
        "http://images.test/\ud800",
        "http://" + "a" * 70_000,
        f"http://{'a' * 64}.test/",
        f"http://{'a.' * 127}test/",
        "http://images..test/",
        "https://.test/",
        "http://images test/",
        "http://%69mages.test/",
    ],
)
async def test_what_is_no_url_is_a_mistake_in_the_request(url: str) -> None:
    async with fetching() as fetcher:
        assert await refusal(fetcher, url, MediaError) == "not a valid URL"


@pytest.mark.parametrize("url", ["", "picture.png", "ftp://images.test/", "gopher://images.test/", "//images.test/"])
async def test_a_url_of_another_scheme_is_forbidden(url: str) -> None:
    async with fetching() as fetcher:
        await refusal(fetcher, url, MediaForbiddenError)


async def test_schemes_can_be_taken_away() -> None:
    async with serving({"/": answer(PICTURE)}) as server, fetching(schemes=("https",)) as fetcher:
        await refusal(fetcher, server.url("/"), MediaForbiddenError)
    assert server.connections == 0


@pytest.mark.parametrize(
    "user", ["user@", "user:password@", ":@x@", "127.0.0.1%40@", "evil.test%2f@", "images.test\\@"]
)
async def test_a_url_with_a_user_is_forbidden(user: str) -> None:
    async with serving({"/": answer(PICTURE)}) as server, fetching() as fetcher:
        await refusal(fetcher, f"http://{user}images.test:{server.port}/", MediaForbiddenError)
    assert server.connections == 0


async def test_ports_can_be_restricted() -> None:
    async with (
        serving({"/": answer(PICTURE)}) as server,
        serving({"/": answer(PICTURE)}) as other,
        fetching(ports=(server.port,)) as fetcher,
    ):
        assert await fetcher.fetch(server.url("/"), 0) == PICTURE
        await refusal(fetcher, other.url("/"), MediaForbiddenError)
        await refusal(fetcher, "http://images.test/", MediaForbiddenError)
    assert other.connections == 0


async def test_hosts_can_be_restricted() -> None:
    names = Names(images_test=[["127.0.0.1"]], other_test=[["127.0.0.1"]])
    scripts = {"/": answer(PICTURE), "/away": in_turn(redirect("//other.test/"))}
    settings: dict[str, Any] = {"hosts": ("images.test",), "internal_hosts": (".test",)}
    async with serving(scripts) as server, fetching(names, **settings) as fetcher:
        assert await fetcher.fetch(server.url("/"), 0) == PICTURE
        await refusal(fetcher, server.url("/", "other.test"), MediaForbiddenError)
        await refusal(fetcher, server.url("/away"), MediaForbiddenError)
    assert names.asked == ["images.test"]


# Redirects


async def test_redirects_are_followed_relative_ones_and_to_other_hosts() -> None:
    async with serving({"/picture": answer(PICTURE)}) as target:
        scripts = {
            "/a/b": redirect("../c"),
            "/c": redirect("?d"),
            "/c?d": answer(b"", 307, location=target.url("/picture")),
        }
        async with serving(scripts) as server, fetching() as fetcher:
            assert await fetcher.fetch(server.url("/a/b"), 0) == PICTURE
    assert server.paths == ["/a/b", "/c", "/c?d"]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/secret",
        "http://localhost:{port}/secret",
        "//127.0.0.1:{port}/secret",
        "http://2130706433:{port}/secret",
        "http://[::ffff:127.0.0.1]:{port}/secret",
        "http://user:password@images.test:{port}/secret",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "ftp://images.test/secret",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
    ],
)
async def test_a_redirect_is_held_to_the_rules_of_the_first_url(location: str) -> None:
    async with serving({"/secret": answer(b"secret")}) as server:
        server.scripts = {**server.scripts, "/": redirect(location.format(port=server.port))}
        async with fetching(file_root=Path("/")) as fetcher:
            await refusal(fetcher, server.url("/"), MediaForbiddenError)
    assert server.paths == ["/"]


@pytest.mark.parametrize("limit", [0, 1, 4])
async def test_a_redirect_loop_ends_at_the_limit(limit: int) -> None:
    message, server = await refusal_from(redirect("/"), max_redirects=limit)
    assert message == f"more than {limit} redirects"
    assert len(server.requests) == limit + 1


@pytest.mark.parametrize("script", [answer(b"", 302), redirect("http://[::1"), redirect("http://0177.0.0.1/")])
async def test_a_redirect_to_nowhere_is_the_hosts_fault(script: Script) -> None:
    message, _ = await refusal_from(script)
    assert message == "its host redirects to no valid URL"


async def test_the_page_of_a_redirect_is_not_read() -> None:
    async with serving({"/picture": answer(PICTURE)}) as server, fetching() as fetcher:
        head = b"HTTP/1.1 302 Found\r\nLocation: /picture\r\nTransfer-Encoding: chunked\r\n\r\n"
        server.scripts = {**server.scripts, "/": endless(lambda: server, head, b"10000\r\n" + bytes(65536) + b"\r\n")}
        assert await fetcher.fetch(server.url("/"), 0) == PICTURE


async def test_cookies_credentials_and_the_referring_page_stay_behind() -> None:
    scripts = {
        "/": redirect("/picture", set_cookie="a=b; Path=/", www_authenticate="Basic"),
        "/picture": answer(PICTURE),
    }
    async with serving(scripts) as server, fetching() as fetcher:
        await fetcher.fetch(server.url("/"), 0)
        await fetcher.fetch(server.url("/picture"), 0)
    assert {name for request in server.requests for name in request.headers} == {
        "host",
        "accept",
        "accept-encoding",
        "user-agent",
    }


# Bytes


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (UNTIL_CLOSED, bytes(65536)),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(65536) + b"\r\n"),
        (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"")[:10], b"\x00\x00\x00\xff\xff" * 8192),
    ],
    ids=["until closed", "chunked", "gzip of nothing"],
)
async def test_an_endless_answer_is_left_at_the_limit(head: bytes, piece: bytes) -> None:
    async with serving({}) as server, fetching(max_bytes=MIB) as fetcher:
        server.scripts = {"/": endless(lambda: server, head, piece)}
        tracemalloc.start()
        try:
            message = await refusal(fetcher, server.url("/"), MediaUnreachableError)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert message == f"it exceeds {MIB} bytes"
    assert server.sent < 32 * MIB  # what the kernel's buffers take beyond the limit
    assert peak < 4 * MIB


async def test_an_answer_that_declares_10_gb_is_not_read() -> None:
    async with serving({}) as server, fetching() as fetcher:
        head = OK + b"Content-Length: 10737418240\r\n\r\n"
        server.scripts = {"/": stall(lambda: server, head)}
        message = await refusal(fetcher, server.url("/"), MediaUnreachableError)
        await asyncio.wait_for(server.left.wait(), 5)
    assert message == "it exceeds 33554432 bytes"


async def test_an_answer_of_the_very_limit_is_taken_and_one_byte_more_is_not() -> None:
    async with (
        serving({"/": answer(bytes(1000)), "/more": answer(bytes(1001))}) as server,
        fetching(max_bytes=1000) as fetcher,
    ):
        assert await fetcher.fetch(server.url("/"), 0) == bytes(1000)
        await refusal(fetcher, server.url("/more"), MediaUnreachableError)


async def test_an_answer_shorter_than_it_declares_is_unreachable_after_the_retries() -> None:
    message, server = await refusal_from(raw(OK + b"Content-Length: 1000\r\n\r\n" + PICTURE[:999], close=True))
    assert message == "its host cannot be connected to, or breaks off"
    assert len(server.requests) == 3


async def test_an_answer_longer_than_it_declares_ends_where_it_said_and_spoils_no_other() -> None:
    lie = OK + b"Content-Length: 10\r\n\r\n" + PICTURE
    async with serving({"/lie": raw(lie), "/": answer(PICTURE)}) as server, fetching() as fetcher:
        assert await fetcher.fetch(server.url("/lie"), 0) == PICTURE[:10]
        assert await fetcher.fetch(server.url("/"), 0) == PICTURE


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: " + b"9" * 5000 + b"\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"X: " + b"x" * 200_000 + b"\r\n",
        b"X: y\r\n" * 40_000,
        b"\xff\xfe: \x00\r\n",
    ],
    ids=["two lengths", "negative length", "long length", "codings", "huge header", "many headers", "not a header"],
)
async def test_an_answer_with_headers_that_are_no_good_is_unreachable(head: bytes) -> None:
    message, _ = await refusal_from(raw(OK + head + b"\r\nsecret", close=True))
    assert message == "its host cannot be connected to, or breaks off"


@pytest.mark.parametrize("data", [b"SSH-2.0-secret\r\n", b"\x00" * 100, b"HTTP/1.1 OK\r\n\r\n"])
async def test_what_does_not_speak_http_is_unreachable(data: bytes) -> None:
    await refusal_from(raw(data, close=True))


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(PICTURE)),
        ("GZIP ", gzip.compress(PICTURE)),
        ("x-gzip", gzip.compress(PICTURE)),
        ("deflate", zlib.compress(PICTURE)),
        ("identity", PICTURE),
    ],
)
async def test_what_a_host_compresses_unasked_is_decompressed(encoding: str, body: bytes) -> None:
    async with serving({"/": answer(body, content_encoding=encoding)}) as server, fetching() as fetcher:
        assert await fetcher.fetch(server.url("/"), 0) == PICTURE


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_decompression_bomb_is_left_at_the_limit(encoding: str, compress: Callable[[bytes], bytes]) -> None:
    bomb = compress(bytes(128 * MIB))
    async with serving({"/": answer(bomb, content_encoding=encoding)}) as server, fetching(max_bytes=MIB) as fetcher:
        tracemalloc.start()
        try:
            message = await refusal(fetcher, server.url("/"), MediaUnreachableError)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert message == f"it exceeds {MIB} bytes"
    assert peak < 8 * MIB


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "chunked"])
async def test_an_encoding_that_is_not_understood_is_refused(encoding: str) -> None:
    message, _ = await refusal_from(answer(PICTURE, content_encoding=encoding))
    assert message == "its host sends it in an encoding that is not understood"


async def test_what_is_not_compressed_as_it_says_is_refused() -> None:
    message, _ = await refusal_from(answer(PICTURE, content_encoding="gzip"))
    assert message == "what its host sends cannot be decompressed"


# Time


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 20", OK + b"X: y", OK + b"Content-Length: 9\r\n\r\nhalf"])
async def test_a_host_that_falls_silent_is_left_after_idle_s(head: bytes) -> None:
    async with serving({}) as server, fetching(idle_s=0.1) as fetcher:
        server.scripts = {"/": stall(lambda: server, head)}
        assert await refusal(fetcher, server.url("/"), MediaUnreachableError) == "its host does not answer in time"
        await asyncio.wait_for(server.left.wait(), 5)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (UNTIL_CLOSED, b"x"),
        (OK + b"X: ", b"y"),
        (OK, b"X: y\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["body", "header", "headers", "informational answers", "chunks"],
)
async def test_a_host_that_drips_is_left_after_total_s(head: bytes, piece: bytes) -> None:
    message, _ = await refusal_from(drip(head, piece, 0.02), total_s=0.3)
    assert message == "it takes longer than 0.3 seconds"


async def test_a_body_below_the_least_pace_is_left_after_idle_s() -> None:
    message, _ = await refusal_from(drip(UNTIL_CLOSED, b"x" * 100, 0.02), idle_s=0.4, min_bytes_per_s=1_000_000)
    assert message == "its host sends it too slowly"


async def test_a_body_above_the_least_pace_may_take_longer_than_idle_s() -> None:
    async with (
        serving({"/": drip(UNTIL_CLOSED, bytes(100), 0.02)}) as server,
        fetching(idle_s=0.4, min_bytes_per_s=10, max_bytes=2500) as fetcher,
    ):
        assert await refusal(fetcher, server.url("/"), MediaUnreachableError) == "it exceeds 2500 bytes"


async def test_a_name_server_that_hangs_is_left_after_connect_s() -> None:
    released = threading.Event()

    def hang(_: str) -> list[str]:
        released.wait(10)
        return ["127.0.0.1"]

    try:
        async with fetching(hang, connect_s=0.1, retries=0) as fetcher:
            message = await refusal(fetcher, "http://images.test/", MediaUnreachableError)
    finally:
        released.set()
    assert message == "its host cannot be connected to in time"


async def test_a_redirect_chain_is_held_to_one_total_time() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        await redirect("/")(reader, writer)

    message, _ = await refusal_from(slow, max_redirects=1000, total_s=0.3)
    assert message == "it takes longer than 0.3 seconds"


# Failures of the host


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418, 429, 304, 300])
async def test_an_answer_that_another_try_would_not_mend_is_asked_for_once(status: int) -> None:
    message, server = await refusal_from(answer(b"secret page", status))
    assert message == f"its host answered with status {status}"
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_a_failing_host_is_asked_again_within_the_retries(status: int) -> None:
    message, server = await refusal_from(answer(b"secret page", status))
    assert message == f"its host answered with status {status}"
    assert len(server.requests) == 3


@pytest.mark.parametrize("failure", [answer(b"", 503), raw(b"", close=True), raw(OK, close=True)])
async def test_a_failure_that_passes_is_not_noticed(failure: Script) -> None:
    async with serving({"/": in_turn(failure, failure, answer(PICTURE))}) as server, fetching() as fetcher:
        assert await fetcher.fetch(server.url("/"), 0) == PICTURE


async def test_retries_are_counted_over_the_whole_of_an_item() -> None:
    scripts = {"/": in_turn(answer(b"", 503), redirect("/next")), "/next": answer(b"", 503)}
    _, server = await refusal_from(scripts, retries=2)
    assert server.paths == ["/", "/", "/next", "/next"]


async def test_retries_wait_and_the_wait_doubles() -> None:
    clock = asyncio.get_running_loop().time
    began = clock()
    await refusal_from(answer(b"", 503), backoff_s=0.1, retries=3)
    assert clock() - began >= 0.7


async def test_a_port_where_nothing_listens_is_unreachable() -> None:
    names = Names(images_test=[["127.0.0.1"]])
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with fetching(names) as fetcher:
            message = await refusal(fetcher, f"http://images.test:{bound.getsockname()[1]}/", MediaUnreachableError)
    assert message == "its host cannot be connected to, or breaks off"
    assert names.asked == ["images.test"] * 3


async def test_a_kept_connection_that_the_host_closed_is_replaced() -> None:
    async with (
        serving({"/": raw(OK + b"Content-Length: 1\r\n\r\nx", close=True)}) as server,
        fetching(retries=0) as fetcher,
    ):
        for index in range(3):
            assert await fetcher.fetch(server.url("/"), index) == b"x"
    assert server.connections == 3


# TLS


async def test_tls_is_trusted_by_the_name_of_the_url_while_the_address_is_the_checked_one(tmp_path: Path) -> None:
    context, pem = certificate(tmp_path, "images.test")
    names = Names(images_test=[["127.0.0.1"]], images_test_=[["127.0.0.1"]])
    async with serving({"/": answer(PICTURE)}, tls=context) as server, fetching(names, ca_file=pem) as fetcher:
        assert await fetcher.fetch(server.url("/", scheme="https"), 0) == PICTURE
        assert await fetcher.fetch(server.url("/", "images.test.", "https"), 0) == PICTURE
    assert server.server_names == ["images.test"] * 2
    assert server.requests[0].headers["host"] == f"images.test:{server.port}"
    assert names.asked == ["images.test", "images.test."]


@pytest.mark.parametrize(("host", "trusted"), [("images.test", False), ("other.test", True), ("127.0.0.1", True)])
async def test_a_certificate_that_is_unknown_or_of_another_host_is_refused(
    tmp_path: Path, host: str, trusted: bool
) -> None:
    context, pem = certificate(tmp_path, host)
    names = Names(images_test=[["127.0.0.1"]])
    async with (
        serving({"/": answer(PICTURE)}, tls=context) as server,
        fetching(names, ca_file=pem if trusted else None) as fetcher,
    ):
        message = await refusal(fetcher, server.url("/", scheme="https"), MediaUnreachableError)
    assert message == "its host offers no TLS connection to be trusted"
    assert server.requests == []
    assert names.asked == ["images.test"]


async def test_a_host_that_does_not_speak_tls_is_unreachable() -> None:
    async with serving({"/": raw(b"")}) as server, fetching(connect_s=0.1) as fetcher:
        await refusal(fetcher, server.url("/", scheme="https"), MediaUnreachableError)
    async with serving({}) as server, fetching() as fetcher:
        server.greeting = b"220 secret SMTP\r\n"
        await refusal(fetcher, server.url("/", scheme="https"), MediaUnreachableError)
    assert server.requests == []


async def test_a_redirect_from_tls_to_loopback_is_forbidden(tmp_path: Path) -> None:
    context, pem = certificate(tmp_path, "images.test", "127.0.0.1")
    async with serving({}, tls=context) as server, fetching(ca_file=pem) as fetcher:
        server.scripts = {"/": redirect(server.url("/secret", "127.0.0.1", "https"))}
        await refusal(fetcher, server.url("/", scheme="https"), MediaForbiddenError)
    assert server.paths == ["/"]


# Many at the same time


class Crowd:
    """A script that answers once `size` requests are at the server together, and counts how many ever were."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.present = self.most = 0
        self.complete = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.present += 1
        self.most = max(self.most, self.present)
        if self.present == self.size:
            self.complete.set()
        await self.complete.wait()
        self.present -= 1
        await answer(PICTURE)(reader, writer)


async def test_the_items_of_a_request_are_fetched_together_and_returned_by_position() -> None:
    scripts = {f"/{index}": answer(bytes([index])) for index in range(20)}
    async with serving(scripts) as server, fetching() as fetcher:
        urls = {index: server.url(f"/{index}") for index in range(0, 20, 2)}
        assert await fetch_all(fetcher, urls) == {index: bytes([index]) for index in urls}
        assert await fetch_all(fetcher, {}) == {}


async def test_a_url_that_occurs_twice_is_fetched_once() -> None:
    async with serving({"/": answer(PICTURE)}) as server, fetching() as fetcher:
        assert await fetch_all(fetcher, {0: server.url("/"), 5: server.url("/")}) == {0: PICTURE, 5: PICTURE}
    assert len(server.requests) == 1


async def test_a_request_has_no_more_items_under_way_than_its_limit() -> None:
    crowd = Crowd(3)
    scripts = {f"/{index}": crowd for index in range(12)}
    async with serving(scripts) as server, fetching(max_fetches_per_request=3) as fetcher:
        await fetch_all(fetcher, {index: server.url(f"/{index}") for index in range(12)})
    assert crowd.most == 3
    assert server.connections == 3


async def test_all_requests_have_no_more_items_under_way_than_the_limit() -> None:
    crowd = Crowd(4)
    scripts = {f"/{index}": crowd for index in range(6)}
    async with serving(scripts) as server, fetching(max_fetches=4, max_fetches_per_request=3) as fetcher:
        urls = {index: server.url(f"/{index}") for index in range(6)}
        await asyncio.gather(*(fetch_all(fetcher, urls) for _ in range(3)))
    assert crowd.most == 4
    assert server.connections == 4


async def test_the_first_failure_ends_the_fetching_of_the_others() -> None:
    async with serving({}) as server, fetching(max_fetches_per_request=2) as fetcher:
        server.scripts = {"/good": stall(lambda: server), "/never": answer(PICTURE)}
        urls = {4: server.url("/good"), 6: server.url("/bad"), 9: server.url("/never")}
        with pytest.raises(MediaUnreachableError, match="image 6: its host answered with status 404"):
            await fetch_all(fetcher, urls)
        await asyncio.wait_for(server.left.wait(), 5)
    assert sorted(server.paths) == ["/bad", "/good"]


async def test_the_items_of_a_request_are_held_to_one_limit_of_bytes() -> None:
    scripts = {f"/{index}": answer(bytes(1000)) for index in range(4)}
    async with serving(scripts) as server, fetching(max_request_bytes=3500) as fetcher:
        urls = {index: server.url(f"/{index}") for index in range(4)}
        await fetch_all(fetcher, {index: urls[index] for index in range(3)})
        with pytest.raises(MediaUnreachableError, match="the request's items together exceed 3500 bytes"):
            await fetch_all(fetcher, urls)


async def test_bytes_of_a_try_that_broke_off_are_not_held_against_the_request() -> None:
    broken = raw(OK + b"Content-Length: 1000\r\n\r\n" + bytes(999), close=True)
    async with (
        serving({"/": in_turn(broken, broken, answer(bytes(1000)))}) as server,
        fetching(max_request_bytes=1000) as fetcher,
    ):
        assert await fetch_all(fetcher, {0: server.url("/")}) == {0: bytes(1000)}


async def test_what_requests_have_fetched_is_held_to_one_limit_until_they_are_through() -> None:
    scripts = {f"/{index}": answer(bytes(1000)) for index in range(2)}
    async with serving(scripts) as server, fetching(max_held_bytes=1500) as fetcher:
        urls = {index: server.url(f"/{index}") for index in range(2)}
        for _ in range(3):
            async with fetcher.fetched({0: urls[0]}):
                with pytest.raises(OverloadedError, match="too much is held"):
                    await fetcher.fetch(urls[1], 1)
            assert await fetcher.fetch(urls[1], 1) == bytes(1000)


async def test_an_item_whose_turn_does_not_come_is_told_that_the_server_is_busy() -> None:
    async with serving({}) as server, fetching(max_fetches=1, total_s=0.2) as fetcher:
        server.scripts = {"/": stall(lambda: server)}
        fetches = [fetcher.fetch(server.url("/"), index) for index in range(3)]
        first, *others = await asyncio.gather(*fetches, return_exceptions=True)
    assert isinstance(first, MediaUnreachableError)
    assert any(isinstance(other, OverloadedError) for other in others)


async def test_a_fetch_that_is_cancelled_leaves_its_turn_and_its_connection_to_others() -> None:
    async with serving({}) as server, fetching(max_fetches=1) as fetcher:
        reached = asyncio.Event()

        async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reached.set()
            await stall(lambda: server, OK)(reader, writer)

        server.scripts = {"/": wait, "/picture": answer(PICTURE)}
        for _ in range(20):
            task = asyncio.create_task(fetch_all(fetcher, {0: server.url("/")}))
            await asyncio.wait_for(reached.wait(), 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(server.left.wait(), 5)
            reached.clear()
            server.left.clear()
        assert await fetcher.fetch(server.url("/picture"), 0) == PICTURE


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_fetch_may_be_cancelled_at_any_of_its_steps(tmp_path: Path, scheme: str) -> None:
    context, pem = certificate(tmp_path, "images.test")
    scripts = {"/": redirect("/picture"), "/picture": answer(PICTURE)}
    async with (
        serving(scripts, tls=context if scheme == "https" else None) as server,
        fetching(max_fetches=1, keepalive_s=0.0, ca_file=pem) as fetcher,
    ):
        url = server.url("/", scheme=scheme)
        assert await fetcher.fetch(url, 0) == PICTURE
        before = open_sockets()
        for steps in count():
            task = asyncio.create_task(fetcher.fetch(url, 0))
            for _ in range(steps):
                await asyncio.sleep(0)
            if not task.cancel():
                break
            with suppress(asyncio.CancelledError):
                await task
        assert await fetcher.fetch(url, 0) == PICTURE
        await until(lambda: open_sockets() <= before)


async def test_a_tls_handshake_that_hangs_ends_with_its_request() -> None:
    async with serving({"/": answer(PICTURE)}) as server, fetching() as fetcher:
        before = open_sockets()
        urls = {index: server.url(f"/{index}", scheme="https") for index in range(5)}
        for _ in range(5):
            task = asyncio.create_task(fetch_all(fetcher, urls))
            await until(lambda: open_sockets() >= before + 2 * len(urls))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: open_sockets() <= before)


async def test_closing_ends_what_is_under_way() -> None:
    reached = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        await stall(lambda: server, OK)(reader, writer)

    async with serving({"/": wait}) as server:
        async with fetching(retries=0) as fetcher:
            task = asyncio.create_task(fetcher.fetch(server.url("/"), 0))
            await asyncio.wait_for(reached.wait(), 5)
        with pytest.raises(MediaUnreachableError):
            await asyncio.wait_for(task, 5)


# Files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "a picture.png").write_bytes(PICTURE)
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    return folder


async def test_a_file_below_the_root_is_read(root: Path) -> None:
    async with fetching(file_root=root) as fetcher:
        assert await fetcher.fetch(f"file://{root}/a%20picture.png", 0) == PICTURE
        assert await fetcher.fetch(f"FILE:{root}/a%20picture.png", 0) == PICTURE


@pytest.mark.parametrize(
    "url",
    [
        "file://{root}/../secret",
        "file://{root}/%2e%2e/secret",
        "file://{root}/..%2Fsecret",
        "file://{root}/link",
        "file://{root}/pipe",
        "file://{root}",
        "file:///etc/passwd",
        "file:etc/passwd",
        "file://localhost{root}/a%20picture.png",
        "file://evil.test{root}/a%20picture.png",
        "file://user@{root}/a%20picture.png",
        "file://{root}/a%20picture.png%00.jpg",
    ],
)
async def test_a_file_url_that_leads_elsewhere_is_forbidden(root: Path, url: str) -> None:
    async with fetching(file_root=root) as fetcher:
        await refusal(fetcher, url.format(root=root), MediaForbiddenError)


async def test_a_file_that_is_not_there_cannot_be_read(root: Path) -> None:
    async with fetching(file_root=root) as fetcher:
        await refusal(fetcher, f"file://{root}/absent", MediaUnreachableError)


async def test_a_file_url_is_forbidden_without_a_root(root: Path) -> None:
    async with fetching() as fetcher:
        await refusal(fetcher, f"file://{root}/a%20picture.png", MediaForbiddenError)


async def test_a_file_is_held_to_the_limits_of_bytes(root: Path) -> None:
    url = f"file://{root}/a%20picture.png"
    async with fetching(file_root=root, max_bytes=len(PICTURE) - 1) as fetcher:
        await refusal(fetcher, url, MediaUnreachableError)
    async with fetching(file_root=root, max_bytes=len(PICTURE)) as fetcher:
        assert await fetcher.fetch(url, 0) == PICTURE
    async with fetching(file_root=root, max_request_bytes=len(PICTURE) - 1) as fetcher:
        await refusal(fetcher, url, MediaUnreachableError)


@pytest.mark.parametrize("rules", [{"max_bytes": 1000}, {"max_request_bytes": 1000}, {"max_held_bytes": 1000}])
async def test_a_file_beyond_a_limit_is_not_read(
    root: Path, rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> bytes:
        raise AssertionError("it was read")

    monkeypatch.setattr("renderer.fetch.read_below", read)
    os.truncate(root / "a picture.png", 1001)
    url = f"file://{root}/a%20picture.png"
    async with fetching(file_root=root, **rules) as fetcher:
        with pytest.raises((MediaUnreachableError, OverloadedError)):
            await fetcher.fetch(url, 0)


async def test_a_file_that_changes_while_it_is_read_is_refused_where_it_grew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, size = f"file://{root}/a%20picture.png", len(PICTURE)
    async with fetching(file_root=root, max_request_bytes=size + 1) as fetcher:
        monkeypatch.setattr("renderer.fetch.size_below", lambda *_: size - 1)
        await refusal(fetcher, url, MediaUnreachableError)
        monkeypatch.setattr("renderer.fetch.size_below", lambda *_: size + 1)
        assert await fetcher.fetch(url, 0) == PICTURE


# Settings


@pytest.mark.parametrize(
    "settings",
    [
        {"unknown": 1},
        {"schemes": ["ftp"]},
        {"hosts": ["http://images.test"]},
        {"hosts": ["images.test:80"]},
        {"internal_hosts": ["*"]},
        {"internal_networks": ["10.0.0.1/8"]},
        {"ports": [0]},
        {"max_bytes": 1},
        {"max_held_bytes": 0},
        {"total_s": 0},
        {"user_agent": "a\r\nCookie: b"},
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        FetchConfig(**settings)


def test_settings_survive_json_and_are_written_as_hosts_are_compared() -> None:
    config = FetchConfig(hosts=("Images.Test", ".CDN.test"), internal_networks=["10.0.0.0/8", "fd00::/8"])
    assert config.hosts == ("images.test", ".cdn.test")
    assert FetchConfig.model_validate_json(config.model_dump_json()) == config

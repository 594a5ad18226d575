"""Images that a request names by an address, over the routes: fetched where they are rendered, by the rules."""

from __future__ import annotations

import asyncio
import io
import re
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from deployments.backends import LocalBackend
from deployments.calls import BorrowCall, Envelope, RenderCall, SamplingRequest
from deployments.config import GreenroomConfig
from deployments.front import Front
from deployments.http.routes import http_app
from deployments.operations import Operations
from deployments.records import Record
from deployments.rendering import RenderOnly
from renderer.conversation import ChatRequest, ImagePart, Message
from renderer.fetch import MediaFetcher
from renderer.fetch_config import FetchConfig
from renderer.image import ImageHeader, ImageLimits, read_header
from renderer.media import MediaItem
from renderer.renderer import Renderer
from tests.renderer.hostile_server import (
    OK,
    UNTIL_CLOSED,
    HostileServer,
    Script,
    answer,
    certificate,
    drip,
    endless,
    redirect,
    serving,
    stall,
)
from tests.stack.helpers import about, picture

MAX_BYTES = 1024 * 1024
PNG = picture(0).png
RENDER = "/v1/chat/completions/render"
CONFIG = GreenroomConfig.model_validate(
    {
        "model": "demo/model",
        "renderer": {"media_threads": 1, "render_threads": 1, "max_image_bytes": MAX_BYTES},
        "engine": None,
    }
)
Fetching = Callable[..., RenderOnly]


@pytest.fixture
async def replica(renderer: Renderer) -> AsyncIterator[RenderOnly]:
    replica = RenderOnly(renderer, Record("render"))
    yield replica
    assert replica.fetcher is not None
    await replica.fetcher.aclose()


@pytest.fixture
def fetching(replica: RenderOnly) -> Fetching:
    """The replica under other rules. `images.test` leads to loopback and is allowed to; names lead where they say."""

    def under(names: dict[str, list[list[str]]] | None = None, **rules: Any) -> RenderOnly:
        known = {"images.test": [["127.0.0.1"]], **(names or {})}

        def resolve(host: str) -> list[str]:
            answers = known.get(host, [[host]])
            return answers.pop(0) if len(answers) > 1 else answers[0]

        defaults = {"internal_hosts": ("images.test",), "backoff_s": 0.0, "total_s": 5.0}
        replica.fetcher = MediaFetcher(FetchConfig(**{**defaults, **rules}), MAX_BYTES, resolve)
        return replica

    return under


@pytest.fixture
async def http(replica: RenderOnly) -> AsyncIterator[httpx.AsyncClient]:
    app = http_app(Operations(Front(CONFIG, LocalBackend(replica)), Record("render")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://greenroom") as client:
        yield client


def asking(*urls: str, **options: Any) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*images, {"type": "text", "text": "?"}]}], **options}


async def error_of(http: httpx.AsyncClient, *urls: str, path: str = RENDER) -> tuple[int, str, str]:
    """Status, type and message of the refusal, proven to tell nothing of the network behind the server."""
    response = await http.post(path, json=asking(*urls))
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (response.status_code, "image_url"), error
    assert not re.search(r"\d+\.\d+\.\d+|::|Errno|secret|/tmp|\.test", error["message"]), error
    return response.status_code, error["type"], error["message"]


async def test_an_address_gives_what_the_same_bytes_give(http: httpx.AsyncClient, fetching: Fetching) -> None:
    fetching()
    sent = (await http.post(RENDER, json={"messages": about(picture(0), text="?"), "request_id": "x"})).json()
    async with serving({"/a.png": answer(PNG)}) as server:
        response = await http.post(RENDER, json=asking(server.url("/a.png"), request_id="x"))
    assert response.status_code == 200, response.text
    assert response.json() == sent
    assert response.headers["server-timing"].startswith("fetch;dur=")


async def test_tokenize_and_layouts_fetch_too_and_equal_addresses_are_fetched_once(
    http: httpx.AsyncClient, fetching: Fetching
) -> None:
    fetching()
    async with serving({"/a.png": answer(PNG)}) as server:
        url = server.url("/a.png")
        tokens = (await http.post("/tokenize", json=asking(url, url))).json()["tokens"]
        layout = (await http.post(RENDER, json=asking(url, url, mm_payload="none"))).json()
    assert layout["token_ids"] == tokens
    assert layout["features"]["kwargs_data"] is None
    assert len(server.requests) == 2


async def test_a_file_below_the_root_is_taken_and_no_other(
    http: httpx.AsyncClient, fetching: Fetching, tmp_path: Path
) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (root / "a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    fetching(file_root=root)
    assert (await http.post(RENDER, json=asking(f"file://{root}/a.png"))).status_code == 200
    for url in (f"file://{root}/../secret.png", "file:///etc/passwd"):
        assert await error_of(http, url) == (403, "PermissionDeniedError", "image 0: its file may not be read")
    fetching()
    assert (await error_of(http, f"file://{root}/a.png"))[0] == 403


@pytest.mark.parametrize("trusted", [True, False])
async def test_a_server_is_trusted_by_a_certificate_of_ones_own(
    http: httpx.AsyncClient, fetching: Fetching, tmp_path: Path, trusted: bool
) -> None:
    context, pem = certificate(tmp_path, "images.test")
    fetching(ca_file=pem if trusted else None)
    async with serving({"/a.png": answer(PNG)}, tls=context) as server:
        url = server.url("/a.png", scheme="https")
        if trusted:
            assert (await http.post(RENDER, json=asking(url))).status_code == 200
        else:
            assert (await error_of(http, url))[:2] == (422, "UnprocessableEntityError")


HOSTILE: dict[str, tuple[Script, int, str]] = {
    "absent": (answer(status=404), 422, "its host answered with status 404"),
    "broken": (answer(status=503), 422, "its host answered with status 503"),
    "to a loopback address": (redirect("http://127.0.0.1:1/"), 403, "its host may not be connected to"),
    "to a private address": (redirect("http://10.0.0.1/"), 403, "its host may not be connected to"),
    "to a metadata service": (redirect("http://169.254.169.254/x"), 403, "its host may not be connected to"),
    "to a file": (redirect("file:///etc/passwd"), 403, "URLs of its scheme may not be fetched"),
    "in a circle": (redirect("/"), 422, "more than 5 redirects"),
    "not an image": (answer(b"<html>secret</html>"), 400, "it is not an image of a known format"),
    "half an image": (answer(PNG[:200]), 400, "it cannot be decoded"),
    "a silent host": (stall(lambda: SERVER[0], OK), 422, "its host does not answer in time"),
    "a dripping host": (drip(OK + b"Content-Length: 99999\r\n\r\n", b"x", 0.05), 422, "its host sends it too slowly"),
    "10 GB announced": (answer(PNG, content_length=str(10**10)), 422, f"it exceeds {MAX_BYTES} bytes"),
    "10 GB sent": (endless(lambda: SERVER[0], UNTIL_CLOSED, bytes(65536)), 422, f"it exceeds {MAX_BYTES} bytes"),
}
SERVER: list[HostileServer] = []


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_host_costs_its_client_a_4xx(http: httpx.AsyncClient, fetching: Fetching, name: str) -> None:
    script, status, reason = HOSTILE[name]
    fetching(idle_s=0.3, total_s=2.0, retries=1)
    async with serving({"/": script, "/a.png": answer(PNG)}) as server:
        SERVER[:] = [server]
        got, _, message = await error_of(http, server.url("/a.png"), server.url("/"))
        assert (got, message.partition(":")[0]) == (status, "image 1"), message
        assert reason in message
        assert (await http.post(RENDER, json=asking(server.url("/a.png")))).status_code == 200
    assert server.sent < 16 * MAX_BYTES  # what buffers of both ends take


async def test_a_decompression_bomb_is_refused_by_its_header(http: httpx.AsyncClient, fetching: Fetching) -> None:
    fetching()
    bomb = io.BytesIO()
    Image.new("1", (9_000, 8_000)).save(bomb, "PNG")
    async with serving({"/": answer(bomb.getvalue())}) as server:
        status, kind, message = await error_of(http, server.url("/"))
    assert (status, kind) == (400, "BadRequestError")
    assert "pixels" in message


async def test_an_address_in_the_network_behind_the_server_is_forbidden(
    http: httpx.AsyncClient, fetching: Fetching
) -> None:
    fetching(names={"inside.test": [["10.1.2.3"]], "meta.test": [["169.254.169.254"]]}, internal_hosts=("meta.test",))
    for host in ("inside.test", "meta.test"):
        assert await error_of(http, f"http://{host}/a.png") == (
            403,
            "PermissionDeniedError",
            "image 0: its host may not be connected to",
        )


async def test_a_name_that_is_rebound_between_two_look_ups_leads_nowhere_else(
    http: httpx.AsyncClient, fetching: Fetching
) -> None:
    fetching(names={"rebound.test": [["203.0.113.7", "8.8.8.8"], ["127.0.0.1"]]}, connect_s=0.2, retries=1)
    async with serving({"/": answer(PNG)}) as server:
        status, _, _ = await error_of(http, server.url("/", host="rebound.test"))
        assert status in (403, 422)
        assert (await error_of(http, server.url("/", host="rebound.test")))[0] == 403
    assert server.connections == 0


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("ftp://a.test/a.png", 400),
        ("a.png", 400),
        ("http://", 400),
        ("http://a b/", 400),
        ("http://u:p@images.test/", 403),
    ],
)
async def test_what_is_no_address_to_fetch_from_is_the_callers_fault(
    http: httpx.AsyncClient, fetching: Fetching, url: str, status: int
) -> None:
    fetching()
    response = await http.post(RENDER, json=asking(url))
    assert (response.status_code, response.json()["error"]["param"]) == (status, "image_url")


async def test_what_can_be_refused_without_its_media_is_refused_before_they_are_fetched(
    http: httpx.AsyncClient, fetching: Fetching
) -> None:
    fetching()
    async with serving({"/": answer(PNG)}) as server:
        many = await http.post(RENDER, json=asking(*[server.url("/")] * 65))
        salt = await http.post(RENDER, json=asking(server.url("/"), cache_salt="a/b"))
    assert (many.status_code, many.json()["error"]["param"]) == (400, "image")
    assert (salt.status_code, salt.json()["error"]["param"]) == (400, "cache_salt")
    assert server.requests == []


async def test_too_much_held_is_an_overload_that_ends_with_the_requests(
    http: httpx.AsyncClient, fetching: Fetching
) -> None:
    fetching(max_held_bytes=len(PNG) + 1)
    async with serving({"/": answer(PNG), "/b": answer(picture(1).png)}) as server:
        two = await http.post(RENDER, json=asking(server.url("/"), server.url("/b")))
        one = await http.post(RENDER, json=asking(server.url("/")))
    assert (two.status_code, two.json()["error"]["type"], two.headers["retry-after"]) == (
        503,
        "ServiceUnavailableError",
        "1",
    )
    assert one.status_code == 200


async def test_a_client_that_leaves_ends_its_fetches(http: httpx.AsyncClient, fetching: Fetching) -> None:
    fetching()
    async with serving({}) as server:
        server.scripts = {"/": stall(lambda: server), "/a.png": answer(PNG)}
        leaving = asyncio.create_task(http.post(RENDER, json=asking(server.url("/"))))
        async with asyncio.timeout(5):
            while not server.requests:  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(0.005)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await asyncio.wait_for(server.left.wait(), 5)


@pytest.mark.parametrize(("images", "tensors", "inline"), [(4, False, True), (5, False, False), (1, True, False)])
async def test_only_headers_of_a_few_images_are_read_on_the_event_loop(
    replica: RenderOnly, monkeypatch: pytest.MonkeyPatch, images: int, tensors: bool, inline: bool
) -> None:
    threads: list[threading.Thread] = []

    def noted(*arguments: Any) -> ImageHeader:
        threads.append(threading.current_thread())
        return read_header(*arguments)

    monkeypatch.setattr("renderer.media.read_header", noted)
    request = ChatRequest((Message("user", (ImagePart(data=PNG),) * images),))
    await replica.render(RenderCall(request, SamplingRequest(), Envelope("id"), skip_mm_cache=True, tensors=tensors))
    assert len(threads) == images
    assert all((thread is threading.main_thread()) == inline for thread in threads)


@pytest.mark.parametrize("counted", [False, True])
async def test_an_item_is_work_where_its_request_is_not_counted_already(replica: RenderOnly, counted: bool) -> None:
    header = read_header(PNG, 0, ImageLimits(max_bytes=MAX_BYTES, max_pixels=MAX_BYTES))
    item = MediaItem(0, PNG, header, header.size, "hash", "key")
    replica.waiting.mean()
    processed = await replica.process_item(BorrowCall(item, skip_mm_cache=False, counted=counted))
    assert processed.nbytes > 0
    assert (replica.waiting.mean() > 0) is not counted

"""Images by their addresses, through every application: fetched by the replica that renders them, by its rules."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from renderer.errors import MediaForbiddenError, MediaUnreachableError
from tests.stack.helpers import QUESTION, Application, about, picture, wait_until

RENDER, CHAT = "/v1/chat/completions/render", "/v1/chat/completions"
FORBIDDEN = "its host may not be connected to"


class Images(BaseHTTPRequestHandler):
    """Two pictures, a page, and a way into the server's own network."""

    def do_GET(self) -> None:
        bodies = {"/0.png": picture(0).png, "/1.png": picture(1).png, "/page": b"<html>"}
        inside = self.path == "/inside"
        self.send_response(302 if inside else 200 if self.path in bodies else 404)
        if inside:
            port = self.headers["Host"].partition(":")[2]
            self.send_header("Location", f"http://127.0.0.1:{port}/0.png")
        body = bodies.get(self.path, b"")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def images() -> Iterator[str]:
    """A web server's address, by the one name that the configuration lets lead inside."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://localhost:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def showing(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]}


def test_a_picture_by_its_address_is_answered_as_its_bytes_are(whole: Application, images: str) -> None:
    asked = {**showing(f"{images}/0.png"), "temperature": 0}
    answer = whole.post(CHAT, asked)
    assert answer.status_code == 200, answer.text
    assert picture(0).color in answer.json()["choices"][0]["message"]["content"]
    assert "fetch;dur=" in answer.headers["server-timing"]
    streamed = whole.post(CHAT, {**asked, "stream": True})
    assert picture(0).color in streamed.text


@pytest.mark.parametrize("name", ["whole", "alone", "render_only"])
def test_every_application_renders_by_address(name: str, images: str, request: pytest.FixtureRequest) -> None:
    app: Application = request.getfixturevalue(name)
    sent = app.post(RENDER, {"messages": about(picture(0), picture(1)), "request_id": "r"})
    fetched = app.post(RENDER, {**showing(f"{images}/0.png", f"{images}/1.png"), "request_id": "r"})
    assert fetched.status_code == 200, fetched.text
    assert fetched.json() == sent.json()


@pytest.mark.parametrize("path", [RENDER, CHAT, "/tokenize"])
def test_what_cannot_be_had_is_a_4xx_that_names_the_image(whole: Application, images: str, path: str) -> None:
    literal = images.replace("localhost", "127.0.0.1")
    for url, status, reason in (
        (f"{images}/none", 422, "its host answered with status 404"),
        (f"{images}/page", 400, "it is not an image of a known format"),
        (f"{images}/inside", 403, FORBIDDEN),
        (f"{literal}/0.png", 403, FORBIDDEN),
        ("http://169.254.169.254/latest/meta-data", 403, FORBIDDEN),
        ("file:///etc/passwd", 403, "file: URLs may not be read here"),
    ):
        response = whole.post(path, showing(f"{images}/0.png", url))
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, "image_url")
        assert error["message"].startswith(f"image 1: {reason}")


def test_a_handles_caller_gets_the_error_itself(whole: Application, images: str) -> None:
    with pytest.raises(MediaUnreachableError) as unreachable:
        whole.call("render_chat", showing(f"{images}/none"))
    assert unreachable.value.index == 0
    with pytest.raises(MediaForbiddenError):
        whole.call("chat_completions", showing("file:///etc/passwd"))


def test_the_operator_finds_the_cause_in_serves_logs(whole: Application, images: str) -> None:
    whole.post(RENDER, showing(f"{images}/inside"))
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path()) / "serve"
    cause = "host '127.0.0.1' may not be connected to: 127.0.0.1"

    def logged() -> bool:
        files = logs.glob("replica_greenroom_RenderReplica_*.log")
        return any(cause in file.read_text() for file in files)

    wait_until(logged, 10, "a line of greenroom.fetch in the render replica's log")

"""Load on a small server of the test's own."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.load import Sample, merged, run


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(400 if body == b"bad" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_client_sends_at_least_its_share(url: str) -> None:
    sample = run(url, os.getpid(), lambda: b"12345", concurrency=3, seconds=0.0, accept="*/*", least=4)
    assert (len(sample.latencies), sample.errors, sample.answer_bytes) == (12, 0, 5)
    assert sample.requests_per_s > 0
    assert sample.quantile_ms(0.5) <= sample.quantile_ms(0.99)


def test_errors_are_counted_and_end_their_client(url: str) -> None:
    sample = run(url, os.getpid(), lambda: b"bad", concurrency=2, seconds=5.0, accept="*/*")
    assert (sample.latencies, sample.errors) == ([], 2)


def test_rounds_merge_by_their_medians() -> None:
    rounds = [Sample([0.1] * 10, 1.0, 0.5, 7), Sample([0.2] * 5, 1.0, 0.5, 7), Sample([0.3] * 2, 1.0, 2.0, 7, 1)]
    whole = merged(rounds)
    assert whole.cpu_ms == pytest.approx(100.0)
    assert whole.requests_per_s == pytest.approx(5.0)
    assert (len(whole.latencies), whole.errors) == (17, 1)

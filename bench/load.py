"""Load over HTTP: so many clients, each sending its next request when the answer to its last one is there."""

from __future__ import annotations

import http.client
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from bench.processes import tree_time

PATH = "/v1/chat/completions/render"
TIMEOUT_S = 120.0


@dataclass(slots=True)
class Sample:
    """What a load showed: seconds of every request, and of the server's processes together."""

    latencies: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    answer_bytes: int = 0
    errors: int = 0

    @property
    def requests_per_s(self) -> float:
        return len(self.latencies) / self.wall_s

    @property
    def cpu_ms(self) -> float:
        """Of one request."""
        return 1e3 * self.cpu_s / max(1, len(self.latencies))

    def quantile_ms(self, part: float) -> float:
        ordered = sorted(self.latencies) or [float("nan")]
        return 1e3 * ordered[min(len(ordered) - 1, int(part * len(ordered)))]


class Client:
    """One connection, kept alive."""

    def __init__(self, url: str, accept: str, path: str = PATH) -> None:
        parts = urlsplit(url)
        self._path = parts.path + path
        self._headers = {"Content-Type": "application/json", "Accept": accept}
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)

    def send(self, body: bytes) -> int:
        """Bytes of the answer.

        Raises:
            RuntimeError: The answer is an error.
        """
        self._connection.request("POST", self._path, body, self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content[:500]!r}")
        return len(content)

    def close(self) -> None:
        self._connection.close()


def run(
    url: str,
    pid: int,
    bodies: Callable[[], bytes],
    concurrency: int,
    seconds: float,
    accept: str,
    least: int = 3,
    path: str = PATH,
) -> Sample:
    """Load a server for about so many seconds, and with `least` requests of each client.

    Args:
        pid: Of the server's first process.
    """
    sample = Sample()
    lock = threading.Lock()
    begun = time.perf_counter()

    def client() -> None:
        one = Client(url, accept, path)
        for number in range(1 << 30):
            if number >= least and time.perf_counter() - begun > seconds:
                break
            body = bodies()
            sent = time.perf_counter()
            try:
                size = one.send(body)
            except (RuntimeError, OSError, http.client.HTTPException):
                with lock:
                    sample.errors += 1
                break
            with lock:
                sample.latencies.append(time.perf_counter() - sent)
                sample.answer_bytes = size
        one.close()

    before = tree_time(pid)
    threads = [threading.Thread(target=client) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sample.wall_s = time.perf_counter() - begun
    sample.cpu_s = tree_time(pid).since(before)
    return sample


def merged(samples: list[Sample]) -> Sample:
    """Rounds of one load as one; its processor time and its length are those of the median round, times the rounds."""
    whole = Sample(answer_bytes=samples[-1].answer_bytes, errors=sum(sample.errors for sample in samples))
    for sample in samples:
        whole.latencies += sample.latencies
    count = len(whole.latencies)
    whole.cpu_s = statistics.median(sample.cpu_ms for sample in samples) * count / 1e3
    whole.wall_s = count / statistics.median(sample.requests_per_s for sample in samples)
    return whole

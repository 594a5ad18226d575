"""Load over a handle: a program on the same Ray that calls the application's client.

It is a process of its own, `python -m bench.handle ADDRESS APPLICATION`, that reads one load a line and answers with a
sample; `Caller` is the other end.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any

from bench.bodies import CASES
from bench.load import Sample
from bench.processes import tree_time


class Caller:
    """The caller's process, for as long as a `with` block lasts.

    Args:
        environment: Of the server's Ray.
        server: Process id of the server.

    Raises:
        RuntimeError: The caller failed; what it said is in the message.
    """

    def __init__(self, environment: Mapping[str, str], address: str, application: str, server: int) -> None:
        self._command = [sys.executable, "-m", "bench.handle", address, application]
        self._environment = dict(environment)
        self._server = server

    def __enter__(self) -> Caller:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        with suppress(OSError):
            self._process.communicate()

    def run(self, case: str, concurrency: int, seconds: float) -> Sample:
        """So many calls at a time for about so many seconds."""
        order = {"case": case, "concurrency": concurrency, "seconds": seconds, "server": self._server}
        line = ""
        if self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the handle's caller ended: {' '.join(self._command)}")
        return Sample(**json.loads(line))


async def load(client: Any, case: str, concurrency: int, seconds: float, server: int) -> Sample:
    """What `Caller.run` asks for."""
    asked = next(one for one in CASES if one.name == case)
    bodies, sample = asked.bodies(), Sample()
    call = client.render_chat if asked.tensors else client.layout
    await call(bodies.message()["messages"])
    before, begun = tree_time(server), time.perf_counter()

    async def caller() -> None:
        while time.perf_counter() - begun < seconds:
            messages = bodies.message()["messages"]
            sent = time.perf_counter()
            prompt = await call(messages)
            sample.latencies.append(time.perf_counter() - sent)
            sample.answer_bytes = sum(item.nbytes for item in prompt.items)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    sample.wall_s = time.perf_counter() - begun
    sample.cpu_s = tree_time(server).since(before)
    return sample


async def main() -> None:
    import ray

    from deployments.client import Client

    address, application = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    ray.init(address, namespace="serve", log_to_driver=False)
    client = Client(application)
    while line := await asyncio.to_thread(sys.stdin.readline):
        answers.write(json.dumps(asdict(await load(client, **json.loads(line)))) + "\n")


if __name__ == "__main__":
    asyncio.run(main())

"""Two vLLM servers of one model, with token-in/token-out over HTTP."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil

from tests.goldens.peer import peer

_OPTIONS = ("--dtype", "float32", "--enable-prompt-tokens-details")


@contextmanager
def two_servers(model: Path) -> Iterator[tuple[str, ...]]:
    """Their addresses. Both compute in float32."""
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        starting = [peer(Path(sys.prefix), model, engine=True, options=_OPTIONS) for _ in range(2)]
        yield tuple(pool.map(stack.enter_context, starting))


async def figure(url: str, name: str) -> float:
    """The sum of a metric of a server."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        text = (await client.get("/metrics")).text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


async def tokens_made(url: str) -> float:
    return await figure(url, "vllm:generation_tokens_total")


def kill_server(url: str) -> None:
    """With all its processes, at once."""
    port = url.rpartition(":")[2]
    for process in psutil.Process().children():
        if process.cmdline()[-2:] == ["--port", port]:
            os.killpg(process.pid, 9)

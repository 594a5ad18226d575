"""The peer: a vLLM 0.32 render server of a virtual environment of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 240
_OPTIONS = ("--trust-request-chat-template", "--trust-request-mm-kwargs")


@contextmanager
def peer(venv: Path, checkpoint: Path) -> Iterator[str]:
    """Start the peer on a checkpoint, yield its address, end it.

    It is started in the checkpoint's parent folder and told the folder's name alone, because the model's name, as
    given, is part of every hash.
    """
    port = _free_port()
    command = [
        str(venv / "bin" / "vllm"),
        "launch",
        "render",
        checkpoint.name,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    with (checkpoint.parent / "peer.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *_OPTIONS],
            cwd=checkpoint.parent,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_healthy(address, process, Path(log.name))
            yield address
        finally:
            _end(process)


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"the peer did not start:\n{log.read_text()[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

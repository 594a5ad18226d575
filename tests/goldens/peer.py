"""The peer: vLLM 0.32, of a virtual environment of its own, as a render server or as a whole engine."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 900
_RENDER = ("--trust-request-chat-template", "--trust-request-mm-kwargs")
_ENGINE = ("--enable-scale-out", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "4")


@contextmanager
def peer(venv: Path, checkpoint: Path, engine: bool = False, options: Sequence[str] = ()) -> Iterator[str]:
    """Start the peer on a checkpoint, yield its address, end it.

    It is started in the checkpoint's parent folder and told the folder's name alone, because the model's name, as
    given, is part of every hash.

    Args:
        engine: Start a whole engine, not only its renderer.
        options: Of vLLM's command line, beside the usual ones.
    """
    port = _free_port()
    command = ["serve", checkpoint.name, *_ENGINE] if engine else ["launch", "render", checkpoint.name, *_RENDER]
    with tempfile.NamedTemporaryFile("w", prefix="peer-", suffix=".log") as log:
        process = subprocess.Popen(
            [str(venv / "bin" / "vllm"), *command, *options, "--host", "127.0.0.1", "--port", str(port)],
            cwd=checkpoint.parent,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_NO_USAGE_STATS": "1",
            },
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

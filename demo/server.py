"""The application of `serve_config.yaml` in a process group of its own, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import httpx
from rich.console import Console

READY_DEADLINE_S = 240.0
STOP_DEADLINE_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """Starts `python -m deployments.launch` on a free loopback port and waits until every replica is warm.

    Raises:
        RuntimeError: It ended, or was not healthy in time; the message holds the end of its log.
    """

    def __init__(self, console: Console, extra_arguments: tuple[str, ...] = ()) -> None:
        self.console = console
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.started_s = 0.0
        self._extra = extra_arguments
        self._log = Path(tempfile.mkstemp(prefix="greenroom-demo-", suffix=".log")[1])
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        begin = time.monotonic()
        command = [sys.executable, "-m", "deployments.launch", "--port", str(self.port), *self._extra]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait_until_ready(begin)
        except BaseException:
            self._stop()
            raise
        self.started_s = time.monotonic() - begin
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.console.status("Shutting down"):
            self._stop()
        self._log.unlink()

    def _wait_until_ready(self, begin: float) -> None:
        with self.console.status("") as status:
            while not self._healthy():
                elapsed = time.monotonic() - begin
                status.update(f"Starting Ray, loading the model, warming every replica up ... {elapsed:.0f} s")
                if self._process is None or self._process.poll() is not None or elapsed > READY_DEADLINE_S:
                    raise RuntimeError(f"the application did not start:\n{self._log.read_text()[-4000:]}")
                time.sleep(0.25)

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _stop(self) -> None:
        """Interrupt it as Ctrl-C would; end what is left of its process group if that takes too long."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

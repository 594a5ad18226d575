"""A core process as its engine sees it: started, told, heard, ended."""

from __future__ import annotations

import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import cast

from engine.channel import Channel
from engine.config import EngineConfig
from engine.messages import FromCore, ToCore

logger = logging.getLogger("greenroom.engine")

_ROOT = Path(__file__).resolve().parent.parent


class CoreProcess:
    """Must be made by a thread that lives as long as the core is wanted: the kernel ends the core with that thread."""

    def __init__(self, config: EngineConfig) -> None:
        paths = [str(_ROOT), os.environ.get("PYTHONPATH")]
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.core", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.DEVNULL,
            )
        self._channel = Channel(ours)
        self._outbox: queue.SimpleQueue[ToCore | EngineConfig | None] = queue.SimpleQueue()
        self._outbox.put(config)
        threading.Thread(target=self._send_all, name="greenroom-engine-send", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToCore) -> None:
        """Queue a message; never blocks. Messages leave in the order of the calls."""
        self._outbox.put(message)

    def receive(self) -> FromCore:
        """Raises EOFError when the core is gone."""
        return cast(FromCore, self._channel.receive())

    def close(self) -> None:
        """Close the channel, whose end is the core's end."""
        self._outbox.put(None)
        self._channel.close()

    def kill(self) -> None:
        """End it without asking, as one that hangs has to be."""
        self._process.kill()
        self.close()

    def reap(self) -> int:
        """Wait for the process to end, and return its code."""
        self.close()
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _send_all(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._channel.send(message)
        except OSError:
            pass  # the core is gone, as who receives from it sees
        except Exception:
            logger.exception("a message to the engine core cannot be sent; the core ends for it")
            self._channel.close()

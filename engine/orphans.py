"""Processes that would outlive the one that needed them, and a watcher that ends them.

vLLM's processes do not notice that the process which started them was killed: they stay, with the device's memory. A
watcher does, whose pipe from that process then ends. It finds them by a mark in their environment, which whatever they
start inherits, so that none is missed, not even one that is still starting. Linux alone; elsewhere nothing is watched.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "GREENROOM_ENDS_WITH"
_ROUNDS = 50
_PAUSE_S = 0.1


@functools.cache
def end_children_with_me() -> None:
    """See to it that processes started from now on end with this one, however it ends."""
    if sys.platform != "linux":
        return
    mark = secrets.token_hex(16)
    theirs, ours = os.pipe()
    command = [sys.executable, "-m", "engine.orphans", mark, str(theirs)]
    root = Path(__file__).parent.parent
    # A session of its own: what is sent to this process's group must not take the watcher along.
    subprocess.Popen(command, pass_fds=(theirs,), start_new_session=True, cwd=root, stdin=subprocess.DEVNULL)
    os.close(theirs)
    _kept.append(ours)
    os.environ[MARK] = mark


def watch(mark: str, pipe: int) -> None:
    """Wait until the other end of the pipe is gone, then end all that bear the mark."""
    while os.read(pipe, 1):
        pass
    for _ in range(_ROUNDS):
        marked = list(_marked(f"{MARK}={mark}".encode()))
        if not marked:
            return
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def _marked(entry: bytes) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and entry in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


_kept: list[int] = []


if __name__ == "__main__":
    watch(sys.argv[1], int(sys.argv[2]))

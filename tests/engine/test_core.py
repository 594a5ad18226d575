"""The core's process ends with its engine, whatever it is doing and however the engine ends, and with nothing else."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engine.channel import Channel
from engine.core import _read
from engine.messages import Ready
from engine.process import CoreProcess
from tests.checkpoints import checkpoint
from tests.engine.builders import engine_config

ROOT = Path(__file__).parent.parent.parent
DEADLINE_S = 30.0

ENGINE = """
import asyncio, sys
from engine.embedded import EmbeddedEngine
from engine.config import EngineConfig

async def main():
    engine = EmbeddedEngine(EngineConfig(model=sys.argv[2], max_model_len=64, max_num_seqs=1))
    starting = asyncio.create_task(engine.start())
    while engine._core is None:
        await asyncio.sleep(0.01)
    print(engine._core.pid, flush=True)
    if sys.argv[1] == "started":
        await starting
        print("started", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("moment", ["starting", "started"])
def test_a_killed_engine_takes_its_core_with_it(moment: str) -> None:
    command = [sys.executable, "-c", ENGINE, moment, str(checkpoint("qwen2"))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        core = psutil.Process(int(engine.stdout.readline()))
        if moment == "started":
            assert engine.stdout.readline() == "started\n"
        engine.kill()
        core.wait(timeout=DEADLINE_S)
    assert not core.is_running()


class Unreadable:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return int, ("not a number",)


@pytest.mark.parametrize(("message", "code"), [(Unreadable(), 1), (None, 0)], ids=["unreadable", "the end"])
def test_the_core_ends_with_the_thread_that_reads(
    message: object | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it: nothing that comes afterwards would be obeyed."""

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", ended)
    ours, theirs = map(Channel, socket.socketpair())
    if message is not None:
        ours.send(message)
    ours.close()
    with pytest.raises(SystemExit) as end:
        _read(theirs, queue.SimpleQueue())
    theirs.close()
    assert end.value.code == code


def test_an_interrupt_of_the_terminal_does_not_end_the_core() -> None:
    core = CoreProcess(engine_config(checkpoint("qwen2")))
    try:
        assert isinstance(core.receive(), Ready)
        os.kill(core.pid, signal.SIGINT)
        core.close()
        # 0 is the way out after the channel's end; an interrupt would show as another code.
        assert core.reap() == 0
    finally:
        core.reap()

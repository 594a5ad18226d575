"""The core's process ends with its engine, whatever it is doing and however the engine ends, and with nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

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

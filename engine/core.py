"""The core: the process that runs the model. Started by `engine.process` as `python -m engine.core FD`."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch

from engine.channel import Channel
from engine.config import EngineConfig
from engine.messages import Compiled, Ready, StartFailed, ToCore
from engine.warmup import warm_up
from engine.worker import Work, Worker
from renderer.errors import EngineError, GreenroomError

logger = logging.getLogger("greenroom.engine.core")

PR_SET_PDEATHSIG = 1
Inbox = queue.SimpleQueue[ToCore | Compiled]


def main(descriptor: int) -> None:
    """Run until the engine at the other end of the channel is gone."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(name)s -- %(message)s")
    channel = Channel(socket.socket(fileno=descriptor))
    config = cast(EngineConfig, channel.receive())
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), name="reader", daemon=True).start()
    try:
        worker, ready = _start(config, inbox)
    except Exception as error:
        logger.exception("the core cannot start")
        unknown = EngineError(f"the engine core cannot start: {error!r}")
        channel.send(StartFailed(error if isinstance(error, GreenroomError) else unknown))
        return
    channel.send(ready)
    _serve(worker, channel, inbox)


def _start(config: EngineConfig, inbox: Inbox) -> tuple[Worker, Ready]:
    torch.set_num_threads(config.threads)
    started = time.perf_counter()
    beside = ThreadPoolExecutor(1, thread_name_prefix="beside")

    def run_beside(work: Work) -> None:
        beside.submit(lambda: inbox.put(work()))

    worker = Worker(config, run_beside)
    seconds = {"load": time.perf_counter() - started} | warm_up(worker)
    logger.info("warm after %s", ", ".join(f"{step} {took:.3f}s" for step, took in seconds.items()))
    return worker, Ready(worker.admission.max_model_len, seconds)


def _serve(worker: Worker, channel: Channel, inbox: Inbox) -> None:
    """Steps while there is work, messages between them; waits for messages where there is none."""
    while True:
        while not worker.scheduler.has_work or not inbox.empty():
            reply = worker.handle(inbox.get())
            _send(channel, worker.drain())
            _send(channel, reply)
        worker.step()
        _send(channel, worker.drain())


def _send(channel: Channel, message: object | None) -> None:
    if message is not None:
        channel.send(message)


def _read(channel: Channel, inbox: Inbox) -> None:
    """Pass messages on; when the engine is gone, so is its core, whatever it is doing."""
    try:
        while True:
            inbox.put(cast(ToCore, channel.receive()))
    except EOFError:
        os._exit(0)
    except BaseException:  # whatever it is, the messages after it would never be obeyed
        logger.exception("the core cannot read what its engine sends")
        os._exit(1)


def _die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, where it offers that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))

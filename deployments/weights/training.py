"""Other weights for a running application: pause, reload, resume, over all engine replicas as one.

    await handle.pause.remote("abort")
    await handle.reload.remote("/checkpoints/step-200")
    await handle.resume.remote()

Not over HTTP: who may change what is served is who may call handles.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from deployments.weights.control import PauseMode
from deployments.weights.wanted import WeightsRecord
from renderer.errors import RequestError

logger = logging.getLogger("ray.serve.greenroom")

Command = Callable[..., Awaitable[tuple[Any, ...]]]


class Training:
    """
    Args:
        command: Has every engine replica do something; raises where one of them could not.
    """

    def __init__(self, command: Command, record: WeightsRecord) -> None:
        self._command = command
        self._record = record

    async def pause(self, mode: PauseMode = "wait") -> None:
        """Hold new generations back on every replica, those that start meanwhile too, and wait until none runs.

        Args:
            mode: What becomes of those that run: `wait` lets them end, `abort` ends them with that reason.

        Raises:
            RequestError: There is no such mode.
            EngineError: A replica failed, or took too long. All stay paused.
        """
        if mode not in ("wait", "abort"):
            raise RequestError(f"mode must be wait or abort, not {mode!r}", "mode")
        await self._record.write(replace(await self._record.read(), paused=True))
        await self._command("pause", mode)

    async def reload(self, path: str | None, version: str | None = None) -> str:
        """Have every replica take the weights of a checkpoint of the same shape.

        What depends on weights is forgotten (encoder and prefix caches), what does not is kept (processed items, sender
        and receiver caches).

        Args:
            path: A folder that every engine replica's node can read; None for the configuration's own weights.
            version: What answers call them in `weight_versions`.

        Returns:
            The version.

        Raises:
            RequestError: Generation is not paused, or the weights do not fit.
            EngineError: A replica failed. All stay paused: reload again, or resume with the weights before.
        """
        before = await self._record.read()
        if not before.paused:
            raise RequestError("weights are changed while generation is paused: call pause first", "path")
        wanted = replace(before, path=path, version=version or uuid.uuid4().hex[:12])
        await self._command("reload", wanted)
        await self._record.write(wanted)
        logger.info("weights are now version %s, of %s", wanted.version, path or "the configuration's model")
        return wanted.version

    async def resume(self) -> None:
        """Go on, every replica with the weights of the last reload that succeeded.

        Raises:
            EngineError: A replica failed.
        """
        wanted = replace(await self._record.read(), paused=False)
        await self._record.write(wanted)
        await self._command("resume", wanted)

"""The weights of one engine replica, as its application wants them."""

from __future__ import annotations

import asyncio
import logging

from deployments.weights.control import Control
from deployments.weights.wanted import Weights, WeightsRecord
from engine.protocol import Engine
from renderer.errors import EngineError

logger = logging.getLogger("ray.serve.greenroom")


class ReplicaWeights:
    """Of one event loop."""

    def __init__(self, engine: Engine, control: Control, record: WeightsRecord) -> None:
        self._engine = engine
        self._control = control
        self._record = record
        self._weights = Weights()
        self._changing = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None

    @property
    def version(self) -> str:
        return self._weights.version

    async def begin(self) -> bool:
        """Before the first request: take the weights that the others have, and pause if they do.

        Returns:
            Whether they are other weights than the configuration's.

        Raises:
            RequestError, EngineError: The weights cannot be taken.
        """
        wanted = await self._record.read()
        differ = wanted.version != self.version
        if differ:
            logger.warning("the weights are version %s, of %s: not the configuration's", wanted.version, wanted.path)
            await self._take(wanted)
        if wanted.paused:
            self._control.hold()
        return differ

    async def reload(self, wanted: Weights) -> None:
        """Take other weights, while paused.

        Raises:
            RequestError: They do not fit, the old ones stay.
            EngineError: Generation is not paused, or the engine failed.
        """
        async with self._changing:
            if not self._control.is_paused:
                raise EngineError("weights are changed while generation is paused")
            await self._take(wanted)

    async def resume(self, wanted: Weights) -> None:
        """Go on, with these weights."""
        async with self._changing:
            if wanted.version != self.version:
                await self._control.pause()
                await self._take(wanted)
            await self._control.resume()

    def follow(self) -> None:
        """Begin to do what the others were told while this replica could not be reached yet; returns at once."""
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        try:
            wanted = await self._record.read()
            if wanted.paused:
                self._control.hold()
            elif self._control.is_paused or wanted.version != self.version:
                await self.resume(wanted)
        except Exception:
            logger.exception("this replica cannot follow its application's weights; it will try again")

    async def _take(self, wanted: Weights) -> None:
        await self._engine.reload(wanted.path)
        self._weights = wanted

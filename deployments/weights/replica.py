"""The weights of one engine replica, as its application wants them."""

from __future__ import annotations

import asyncio
import logging

from deployments.weights.control import Control, PauseMode
from deployments.weights.wanted import Weights, WeightsRecord
from engine.protocol import Engine
from renderer.errors import EngineDeadError, EngineError, RequestError

logger = logging.getLogger("ray.serve.greenroom")


class ReplicaWeights:
    """Of one event loop.

    What commands say goes before what the record says: a command may be newer than what was read.
    """

    def __init__(self, engine: Engine, control: Control, record: WeightsRecord) -> None:
        self._engine = engine
        self._control = control
        self._record = record
        self._weights: Weights | None = Weights()  # None: nobody knows, a reload has failed
        self._changing = asyncio.Lock()
        self._commands = 0
        self._following: asyncio.Task[None] | None = None
        self._fault: Exception | None = None

    @property
    def version(self) -> str:
        return "unknown" if self._weights is None else self._weights.version

    async def begin(self) -> bool:
        """Before the first request: take the weights that the others have, and pause if they do.

        Returns:
            Whether they are other weights than the configuration's.

        Raises:
            RequestError, EngineError: The weights cannot be taken.
        """
        differ = False
        while not self._are(wanted := await self._record.read()):  # others may be decided on while these are taken
            differ = True
            logger.warning("the weights are version %s, of %s: not the configuration's", wanted.version, wanted.path)
            await self._take(wanted)
        if wanted.paused:
            self._control.hold()
        return differ

    async def pause(self, mode: PauseMode) -> None:
        """Hold new generations back and wait until the engine has none."""
        self._commands += 1
        await self._control.pause(mode)

    async def reload(self, wanted: Weights) -> None:
        """Take other weights, while paused.

        Raises:
            RequestError: They do not fit, the old ones stay.
            EngineError: Generation is not paused, or the engine failed: `resume` does not go on before it has taken
                weights whole.
        """
        self._commands += 1
        async with self._changing:
            if not self._control.is_paused:
                raise EngineError("weights are changed while generation is paused")
            await self._take(wanted)

    async def resume(self, wanted: Weights) -> None:
        """Go on, with these weights.

        Raises:
            RequestError, EngineError: They cannot be taken; generation stays paused.
        """
        self._commands += 1
        await self._go_on(wanted, self._commands)

    def follow(self) -> None:
        """Begin to do what the others were told while this replica could not be reached yet; returns at once."""
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow())

    def check(self) -> None:
        """
        Raises:
            EngineError: This replica should generate with weights that it could not take.
        """
        if self._fault is not None:
            raise EngineError(f"the application's weights cannot be taken: {self._fault}") from self._fault

    async def _follow(self) -> None:
        commands = self._commands
        try:
            wanted = await self._record.read()
            if commands == self._commands:
                await self._obey(wanted, commands)
            self._fault = None
        except EngineDeadError:
            logger.warning("this replica follows its application's weights once its engine is up")
        except Exception as error:
            logger.exception("this replica cannot follow its application's weights; it will try again")
            self._fault = error

    async def _obey(self, wanted: Weights, commands: int) -> None:
        if wanted.paused:
            self._control.hold()
        elif self._control.is_paused or not self._are(wanted):
            await self._go_on(wanted, commands)

    async def _go_on(self, wanted: Weights, commands: int) -> None:
        """Take the weights if need be, and resume, unless another command came while that went on."""
        async with self._changing:
            if not self._are(wanted):
                await self._control.pause()
                await self._take(wanted)
            if commands == self._commands:
                await self._control.resume()

    def _are(self, wanted: Weights) -> bool:
        return self._weights is not None and wanted.version == self._weights.version

    async def _take(self, wanted: Weights) -> None:
        before, self._weights = self._weights, None
        try:
            await self._engine.reload(wanted.path)
        except RequestError:
            self._weights = before
            raise
        self._weights = wanted

"""The outputs of one request on their way to whoever reads them."""

from __future__ import annotations

import asyncio

from engine.protocol import EngineOutput
from renderer.errors import GreenroomError


class Stream:
    """Holds what came since the last read as one output, so that a slow reader costs nothing. Of one event loop."""

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self.ended = False
        self._output: EngineOutput | None = None
        self._error: GreenroomError | None = None
        self._news = asyncio.Event()

    def push(self, output: EngineOutput | GreenroomError) -> None:
        if isinstance(output, GreenroomError):
            self._error = output
        else:
            self._output = output if self._output is None else _join(self._output, output)
        self._news.set()

    async def next(self) -> EngineOutput:
        """Everything since the last call; waits where there is nothing.

        Raises:
            GreenroomError: The request failed; raised once what came before has been read.
        """
        await self._news.wait()
        output, self._output = self._output, None
        if output is None:
            self.ended = True
            raise self._error or RuntimeError("woken for nothing")
        self.ended = output.finish_reason is not None
        if self._error is None:
            self._news.clear()
        return output


def _join(first: EngineOutput, second: EngineOutput) -> EngineOutput:
    return EngineOutput(
        first.token_ids + second.token_ids,
        second.finish_reason,
        second.stop_reason,
        second.num_cached_tokens,
        first.logprobs + second.logprobs,
        second.last_is_text,
    )

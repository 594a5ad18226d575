"""An engine that runs elsewhere: vLLM servers with token-in/token-out over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

import httpx

from engine.continuation import Continuation
from engine.protocol import EngineOutput, EngineStats, SamplingParams
from engine.relay import Relay
from engine.remote_config import RemoteEngineConfig
from engine.remote_server import Server, ServerPool
from engine.remote_wire import Wire, read_cached_tokens, read_event
from engine.requests import UnderWay
from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import (
    EngineDeadError,
    EngineError,
    EngineStartingError,
    NotSupportedError,
    OverloadedError,
)
from renderer.families import choose_family
from renderer.family import Field
from renderer.prompt import RenderedPrompt

_ABORT = "/inference/v1/abort_requests"
_ID_PREFIX = "generate-tokens-"  # what a server puts before the id that it is given
_RESETS = ("/reset_mm_cache", "/reset_encoder_cache", "/reset_prefix_cache")
_POLL_S = 0.5


class RemoteEngine:
    """An engine of the event loop in which it is started. It shares no cache with a renderer: items cross whole."""

    sender_cache = None

    def __init__(self, config: RemoteEngineConfig) -> None:
        self.config = config
        self._pool = ServerPool(config)
        self._wire: Wire | None = None
        self._max_model_len = 0
        self._relay = Relay(lambda: self.max_model_len)
        self._placed: dict[str, Server] = {}

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together that every server holds for one request.

        Raises:
            EngineStartingError: It has not started.
        """
        self._started()
        return self._max_model_len

    async def start(self) -> None:
        """Wait for the first server, and check that it takes token-in/token-out requests for the model.

        Raises:
            ConfigError: A server is up and does not, or the checkpoint is unknown.
            EngineStartingError: There is none in time.
        """
        fields = await asyncio.to_thread(_fields, self.config)
        limit = await self._first_limit()
        self._max_model_len = min(limit, self.config.max_model_len or limit)
        self._wire = Wire(fields, self.config.dtype, self.config.served_model_name)

    def generate(
        self, prompt: RenderedPrompt, params: SamplingParams, *, request_id: str, prior_output_ids: Sequence[int] = ()
    ) -> AsyncGenerator[EngineOutput]:
        """See `engine.protocol.Engine`. The request is sent when the first output is asked for.

        `num_cached_tokens` is known at the end alone, and only of servers with `--enable-prompt-tokens-details`.

        Raises:
            EngineStartingError: No server could be reached; none has seen the request.
            EngineDeadError: The connection was lost, or the server's engine.
        """

        def run(plan: Continuation, request: UnderWay) -> AsyncGenerator[EngineOutput]:
            return self._outputs(prompt, plan, request_id, request)

        return self._relay.generate(prompt, params, request_id, prior_output_ids, run)

    async def abort(self, request_id: str) -> None:
        """End a request here, wherever it is on its way, and at the server that has it, if one has."""
        server = self._placed.get(request_id)
        if self._relay.requests.abort(request_id) and server is not None:
            with suppress(EngineDeadError):
                await self._pool.post(server, _ABORT, {"request_ids": [_ID_PREFIX + request_id]})

    async def health(self) -> None:
        """Ask the servers, unless one has answered a moment ago.

        Raises:
            EngineDeadError: None is well.
        """
        if not await self._pool.any_is_well():
            raise EngineDeadError("no server of the remote engine is well")

    async def stats(self) -> EngineStats:
        """Counters of what passed through here."""
        return replace(self._relay.counters, running=sum(server.in_flight for server in self._pool.servers))

    async def reset_cache(self) -> None:
        """Empty the servers' caches.

        Raises:
            NotSupportedError: A server does not let itself be told to (vLLM does with `VLLM_SERVER_DEV_MODE=1`).
        """
        for server in self._pool.servers:
            for path in _RESETS:
                if await self._pool.post(server, path, None) == httpx.codes.NOT_FOUND:
                    raise NotSupportedError("the remote engine does not let its caches be emptied")

    async def reload(self, path: str | None) -> None:
        """
        Raises:
            NotSupportedError: Always; the servers' weights are their operator's.
        """
        raise NotSupportedError("a remote engine does not take other weights")

    async def close(self) -> None:
        """Close all connections; streams that still run end with EngineDeadError."""
        await self._pool.close()

    async def _outputs(
        self, prompt: RenderedPrompt, plan: Continuation, request_id: str, request: UnderWay
    ) -> AsyncGenerator[EngineOutput]:
        async with request.step():
            body = await asyncio.to_thread(self._started().body, prompt, plan.appended, plan.params, request_id)
            server, response = await self._pool.open(body)
        self._placed[request_id] = server
        self._relay.count(tensors_received=len(prompt.items), tensor_bytes_received=sum(i.nbytes for i in prompt.items))
        ended = False
        try:
            with self._pool.turn(server):
                async with aclosing(self._read(server, response, plan.params)) as outputs:
                    while not ended:
                        async with request.step():
                            output = await anext(outputs)
                        ended = output.finish_reason is not None
                        cached = min(output.num_cached_tokens, len(prompt.token_ids))  # not of what is appended
                        self._relay.count(cached_tokens=cached)
                        yield replace(output, num_cached_tokens=cached)
        finally:
            self._relay.count(aborted=not ended and not request.is_aborted)
            self._placed.pop(request_id, None)
            await response.aclose()

    async def _read(
        self, server: Server, response: httpx.Response, params: SamplingParams
    ) -> AsyncGenerator[EngineOutput]:
        """The outputs of an answer, the last one with its reason.

        Raises:
            EngineDeadError: It breaks off, or the server ends it.
            EngineError: The server fails on this request.
        """
        ended = False
        try:
            async for output in _outputs_of(response, params):
                if output.finish_reason == "abort":  # nobody here has asked for it: the server is shutting down
                    raise EngineDeadError("the server ended the request")
                ended = output.finish_reason is not None
                yield output
        except httpx.HTTPError as error:
            raise self._pool.lost(server) from error
        except OverloadedError as error:
            raise EngineDeadError(error.message) from error
        except EngineDeadError:
            server.failed()
            raise
        except EngineError as error:
            raise await self._pool.judged(server, error) from error
        if not ended:
            raise self._pool.lost(server)

    async def _first_limit(self) -> int:
        """`max_model_len` of the servers that are up, once there is one."""
        deadline = time.monotonic() + self.config.start_timeout_s
        while True:
            limit = await self._pool.max_model_len()
            if limit is not None:
                return limit
            if time.monotonic() > deadline:
                raise EngineStartingError(f"no server answers at {', '.join(self.config.urls)}")
            await asyncio.sleep(_POLL_S)

    def _started(self) -> Wire:
        if self._wire is None:
            raise EngineStartingError("the engine has not started")
        return self._wire


async def _outputs_of(response: httpx.Response, params: SamplingParams) -> AsyncGenerator[EngineOutput]:
    """What the events of an answer bring. The last output waits for the usage, which follows at once."""
    last: EngineOutput | None = None
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        output = read_event(data, params)
        if output is None:
            last = last and replace(last, num_cached_tokens=read_cached_tokens(data))
        elif output.finish_reason is not None:
            last = output
        elif output.token_ids:
            yield output
    if last is not None:
        yield last


def _fields(config: RemoteEngineConfig) -> Mapping[str, Field]:
    """How the family's tensors travel."""
    renderer = RendererConfig(model=config.model, revision=config.revision)
    return choose_family(Checkpoint.load(renderer), renderer).fields

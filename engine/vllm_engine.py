"""An engine whose core is vLLM: an AsyncLLM in this process, fed with rendered prompts beside its own renderer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.continuation import Continuation
from engine.protocol import EngineOutput, EngineStats, SamplingParams
from engine.relay import Relay
from engine.requests import UnderWay
from engine.vllm_adapter import engine_input, engine_output, is_failed, vllm_params
from engine.vllm_config import VllmEngineConfig
from engine.vllm_core import VllmCore, own_errors
from engine.vllm_mirror import SentItem, VllmSenderCache
from engine.vllm_weights import check_weights, checkpoint_folder
from renderer.errors import (
    EngineDeadError,
    EngineError,
    EngineStartingError,
    OverloadedError,
    RequestError,
)
from renderer.prompt import RenderedPrompt

logger = logging.getLogger("greenroom.engine")

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request under way. `queue` is vLLM's collector of its outputs."""

    core: VllmCore
    queue: Any
    items: tuple[SentItem, ...]

    async def next(self) -> Any:
        """
        Raises:
            EngineDeadError: vLLM has ended, whatever it ended of.
            EngineError: It failed on this request.
        """
        try:
            with own_errors():
                output = self.queue.get_nowait() or await self.queue.get()
        except EngineError as error:
            if self.core.is_alive:
                raise
            raise EngineDeadError(error.message) from error
        if output.finished and output.outputs[0].finish_reason == "abort":
            raise EngineDeadError("vLLM is shutting down")  # nobody has asked it for that
        return output


class VllmEngine:
    """An engine of the event loop in which it is started.

    Items cross by reference where `sender_cache` says that vLLM's receiver cache holds them. To plan a request, to send
    it and to apply the plan is one step, and nobody else sends images to this vLLM, so the mirror holds.
    """

    def __init__(self, config: VllmEngineConfig) -> None:
        self.config = config
        self.sender_cache = VllmSenderCache(config.mm_cache_bytes)
        self._order = asyncio.Lock()
        self._core: VllmCore | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._relay = Relay(lambda: self.max_model_len)
        self._weights: str | None = None

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together that the engine can hold for one request.

        Raises:
            EngineStartingError: It has not started.
        """
        return self._serving().max_model_len

    async def start(self) -> None:
        """Start vLLM and send it a first request.

        Raises:
            ConfigError: vLLM refuses the model or an option, or is not installed.
        """
        await self._begin()
        self._keeper = asyncio.create_task(self._keep(), name="greenroom-vllm")

    def generate(
        self, prompt: RenderedPrompt, params: SamplingParams, *, request_id: str, prior_output_ids: Sequence[int] = ()
    ) -> AsyncGenerator[EngineOutput]:
        """See `engine.protocol.Engine`. The request is sent when the first output is asked for.

        With `prior_output_ids` a request that has a seed, a schema, or presence or frequency penalties is generated
        again from its beginning; see `engine.continuation`.
        """

        def run(plan: Continuation, request: UnderWay) -> AsyncGenerator[EngineOutput]:
            return self._outputs(self._serving(), prompt, plan, request_id, request)

        return self._relay.generate(prompt, params, request_id, prior_output_ids, run)

    async def abort(self, request_id: str) -> None:
        self._relay.requests.abort(request_id)

    async def health(self) -> None:
        self._serving()

    async def stats(self) -> EngineStats:
        """Counters of what passed through here; vLLM does not tell how often its vision encoder ran."""
        cache, core = self.sender_cache.stats, self._core
        stats = replace(self._relay.counters, receiver_items=cache.entries, receiver_bytes=cache.bytes)
        if core is None:
            return stats
        running = min(core.levels.running, core.unfinished)
        return replace(
            stats,
            running=running,
            waiting=core.unfinished - running,
            blocks_used=round(core.levels.kv_cache_usage * core.blocks),
            blocks_total=core.blocks,
            warmup_s=core.warmup_s,
        )

    async def reset_cache(self) -> None:
        """Empty vLLM's receiver, encoder and prefix caches, and the sender cache with them."""
        async with self._order:
            await self._serving().clear_caches()
            self.sender_cache.clear_cache()

    async def reload(self, path: str | None) -> None:
        """See `engine.protocol.Engine`. A vLLM that is started later has these weights too.

        Raises:
            EngineDeadError: vLLM failed over weights that seemed to fit; it is started again, with those before.
        """
        core = self._serving()
        own = await asyncio.to_thread(self._own_checkpoint)
        if path is not None:
            await asyncio.to_thread(check_weights, Path(path), own, core.place_of_weights())
        taking = asyncio.create_task(self._take(core, path, str(path or own)))
        await asyncio.shield(taking)  # once begun, it is done or it is undone, whether anybody waits or not

    async def _take(self, core: VllmCore, path: str | None, folder: str) -> None:
        async with self._order:
            if core.unfinished:
                raise EngineError(f"weights cannot change under {core.unfinished} requests")
            try:
                await core.reload(folder)
            except EngineError as error:
                await core.close()
                raise EngineDeadError(f"vLLM failed to take the weights of {folder}: {error}") from error
            self._weights = path

    def _own_checkpoint(self) -> Path:
        cache = self.config.engine_args.get("download_dir")
        return checkpoint_folder(self.config.model, self.config.revision, cache)

    async def close(self) -> None:
        """End vLLM; streams that still run end with EngineDeadError."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        core, self._core = self._core, None
        if core is not None:
            await core.close()

    async def _outputs(
        self, core: VllmCore, prompt: RenderedPrompt, plan: Continuation, request_id: str, request: UnderWay
    ) -> AsyncGenerator[EngineOutput]:
        async with request.step():
            sent = await self._send(core, prompt, plan, request_id)
        output = None
        try:
            async with request.step():
                output = await sent.next()
                if is_failed(output) and any(item.by_reference for item in sent.items):
                    sent, output = await self._send_again(sent, prompt, plan, request_id), None
                    output = await sent.next()
            self._relay.count(cached_tokens=min(output.num_cached_tokens or 0, len(prompt.token_ids)))
            while True:
                yield engine_output(output, plan.params, len(prompt.token_ids))
                if output.finished:
                    return
                async with request.step():
                    output = await sent.next()
        finally:
            if core.is_alive and (output is None or not output.finished):
                self._relay.count(aborted=not request.is_aborted)
                await core.llm.abort(sent.queue.request_id, internal=True)

    async def _send(self, core: VllmCore, prompt: RenderedPrompt, plan: Continuation, request_id: str) -> _Sent:
        """Plan, send and apply, with nothing sent in between.

        Raises:
            CacheMissError: An item was held when it was looked up, and is no more: render again.
        """
        async with self._order:
            planned = self.sender_cache.plan(prompt.items)
            value, items = engine_input(prompt, plan.appended, planned, core.form)
            arrives = False
            try:
                with own_errors():
                    queue = await core.llm.add_request(request_id, value, vllm_params(plan.params))
                arrives = True
            except (RequestError, OverloadedError):
                items = ()  # refused before it was sent
                raise
            finally:
                self._entered(items, sure=arrives)
        return _Sent(core, queue, items)

    def _entered(self, items: Sequence[SentItem], sure: bool) -> None:
        """Count what has crossed, or may have."""
        self.sender_cache.apply(items, sure)
        whole = [item.nbytes for item in items if not item.by_reference]
        self._relay.count(tensors_received=len(whole), tensor_bytes_received=sum(whole))

    async def _send_again(self, sent: _Sent, prompt: RenderedPrompt, plan: Continuation, request_id: str) -> _Sent:
        """The receiver lacks an item that the mirror claimed. Whatever there is of tensors crosses this time.

        Raises:
            CacheMissError: There are none of an item: render again.
        """
        by_reference = [item.cache_key for item in sent.items if item.by_reference]
        self.sender_cache.doubt(by_reference)
        self._relay.count(receiver_misses=1)
        logger.warning("vLLM lacks one of %d items that it should hold; sending the request again", len(by_reference))
        return await self._send(sent.core, prompt, plan, request_id)

    async def _begin(self) -> None:
        core = await VllmCore.start(self.config)
        try:
            if self._weights is not None:
                await core.reload(self._weights)
        except BaseException:
            await core.close()
            raise
        self.sender_cache.reset()
        if not core.can_mirror:
            self.sender_cache.disable()
        self._core = core

    async def _keep(self) -> None:
        """Start another vLLM whenever one dies."""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                if self._core is not None:
                    pause = _FIRST_PAUSE_S
                    await self._mourn(self._core)
                await self._begin()
                self._relay.count(restarts=1)
            except Exception:
                logger.exception("vLLM could not be started again; next attempt in %.0f s", pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _mourn(self, core: VllmCore) -> None:
        """Wait for the end of a vLLM, and forget what it held."""
        await core.died()
        logger.error("vLLM's engine core ended; %d requests end with it", core.unfinished)
        async with self._order:
            self._core = None
            self.sender_cache.reset()
        await core.close()

    def _serving(self) -> VllmCore:
        if self._core is None or not self._core.is_alive:
            raise EngineStartingError("vLLM is not up")
        return self._core

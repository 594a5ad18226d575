"""The core: the process that runs the model. Started by `engine.embedded` as `python -m engine.core FD`."""

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
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from engine.blocks import BlockPool
from engine.channel import Channel
from engine.config import EngineConfig
from engine.encoder_cache import EncoderCache
from engine.messages import Abort, Call, Outputs, Ready, Reply, StartFailed, Submit, ToCore
from engine.model import Model
from engine.protocol import EngineOutput, EngineStats, FinishReason, TokenLogprobs
from engine.receiver import ReceiverCache
from engine.request import Request, RequestItem, new_seed
from engine.sampling import sample
from engine.scheduler import Scheduler, Step
from renderer.errors import ConfigError, ContextLengthError, EngineError, GreenroomError, RequestError
from renderer.prompt import Tensors

logger = logging.getLogger("greenroom.engine.core")

PR_SET_PDEATHSIG = 1


class Core:
    """The model, its caches and its requests. `handle` obeys one message, `step` computes one step."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.model = Model(config)
        self.max_model_len = self._model_len()
        self.pool = BlockPool(self.model.num_blocks)
        self.receiver = ReceiverCache()
        self.encoder_cache = EncoderCache(config.encoder_cache_bytes)
        self.scheduler = Scheduler(config, self.pool, self.encoder_cache)
        self.requests: dict[int, Request] = {}
        self._outputs: list[tuple[int, EngineOutput]] = []
        self._failures: list[tuple[int, GreenroomError]] = []
        self._stats = EngineStats(blocks_total=self.model.num_blocks)

    @property
    def stats(self) -> EngineStats:
        return replace(
            self._stats,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            cached_tokens=self.scheduler.cached_tokens,
            encoder_hits=self.scheduler.encoder_hits,
            tensors_received=self.receiver.tensors_received,
            tensor_bytes_received=self.receiver.tensor_bytes_received,
            receiver_items=len(self.receiver),
            receiver_bytes=self.receiver.bytes,
            blocks_used=self.pool.used,
        )

    def handle(self, message: ToCore) -> Reply | None:
        """Obey one message; return the answer that it asks for."""
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                for key in message.keys:
                    self._abort(key, message.silent)
            case Call():
                if message.operation == "reset_cache":
                    self._reset(message.drop)
                return Reply(message.number, self.stats)
        return None

    def step(self) -> None:
        """Encode, compute and sample what the scheduler plans. A failure ends the requests of the step alone."""
        step = self.scheduler.schedule()
        try:
            self._encode(step)
            logits = self.model.forward(step.chunks)
            sampling = [chunk.request for chunk in step.chunks if chunk.samples]
            tokens, logprobs = sample(logits, sampling, self.model.eos_ids) if sampling else ([], [])
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("a step of %d requests failed", len(step.chunks))
            self._fail_step(step)
            return
        self._advance(step)
        for request, token, logprob in zip(sampling, tokens, logprobs, strict=True):
            self._take(request, token, logprob)

    def drain(self) -> Outputs | None:
        """Outputs since the last call, all requests together."""
        if not self._outputs and not self._failures:
            return None
        outputs = Outputs(tuple(self._outputs), tuple(self._failures))
        self._outputs, self._failures = [], []
        return outputs

    def _submit(self, message: Submit) -> None:
        self._count(requests=1)
        try:
            tensors = self.receiver.obey(message.submission)
            request = self._build(message, tensors)
        except GreenroomError as error:
            self._failures.append((message.key, error))
            return
        self._count(prompt_tokens=request.num_prompt)
        finish = self._finish_reason(request) if request.num_outputs else None
        if finish is not None:
            self._outputs.append((message.key, EngineOutput((), *finish)))
            return
        self.requests[request.key] = request
        self.scheduler.add(request)

    def _build(self, message: Submit, tensors: Sequence[Tensors]) -> Request:
        """Raises RequestError for a request that can never be served."""
        params, prompt = message.params, message.token_ids
        total = len(prompt) + params.max_tokens
        self._check_length(len(prompt), total)
        self._check_tokens(message)
        for item, range_ in zip(tensors, message.ranges, strict=True):
            self.model.check_item(item, range_)
        known = len(prompt) + len(message.prior_output_ids)
        tokens = np.zeros(max(total, known), dtype=np.int32)
        tokens[: len(prompt)] = prompt
        tokens[len(prompt) : known] = message.prior_output_ids
        positions, delta = self.model.positions(prompt, list(zip(message.ranges, tensors, strict=True)))
        keys = [item.cache_key for item in message.submission.items]
        return Request(
            key=message.key,
            tokens=tokens,
            num_prompt=len(prompt),
            num_tokens=known,
            params=params,
            items=tuple(map(RequestItem, keys, message.ranges, tensors)),
            positions=positions,
            delta=delta,
            cache_salt=message.cache_salt,
            seed=new_seed(params),
            block_table=np.zeros(self._blocks_for(total), dtype=np.int32),
        )

    def _check_length(self, prompt: int, total: int) -> None:
        if prompt == 0:
            raise RequestError("the prompt has no tokens", "prompt")
        if total > self.max_model_len:
            raise ContextLengthError(
                f"{prompt} prompt tokens and max_tokens={total - prompt} together exceed the "
                f"{self.max_model_len} tokens that this engine holds for one request",
                "max_tokens" if prompt < self.max_model_len else "prompt",
            )

    def _check_tokens(self, message: Submit) -> None:
        for ids in (message.token_ids, message.prior_output_ids):
            if len(ids) and (ids.min() < 0 or ids.max() >= self.model.vocab_size):
                raise RequestError(f"a token id is outside the vocabulary of {self.model.vocab_size}", "prompt")

    def _blocks_for(self, tokens: int) -> int:
        """Blocks for all but the last token, whose keys and values nobody reads."""
        return -(-(tokens - 1) // self.config.block_size) or 1

    def _model_len(self) -> int:
        """Raises ConfigError where the configured length does not fit the model or the block pool."""
        fits: int = self.model.num_blocks * self.config.block_size
        wanted = self.config.max_model_len
        if wanted is None:
            return min(self.model.max_positions, fits)
        if wanted > fits:
            raise ConfigError(f"max_model_len={wanted} needs more than kv_cache_bytes, which hold {fits} tokens")
        if wanted > self.model.max_positions:
            raise ConfigError(f"max_model_len={wanted} exceeds the model's {self.model.max_positions} positions")
        return wanted

    def _abort(self, key: int, silent: bool) -> None:
        request = self.requests.pop(key, None)
        if request is None:
            return
        self.scheduler.remove(request)
        self._count(aborted=1)
        if not silent:
            self._outputs.append((key, EngineOutput((), "abort", None, request.cached)))

    def _reset(self, drop: Sequence[str]) -> None:
        for key in drop:
            self.receiver.drop(key)
        self.encoder_cache.clear()
        self.pool.clear_prefixes()

    def _encode(self, step: Step) -> None:
        """Run the vision encoder once over the step's items; those that need one output share it."""
        if not step.encode:
            return
        embeds = self.model.encode([items[0].tensors for items in step.encode.values()])
        for (key, items), output in zip(step.encode.items(), embeds, strict=True):
            self.encoder_cache.put(key, output)
            for item in items:
                item.embeds = output
        self._count(encoder_runs=len(embeds))

    def _advance(self, step: Step) -> None:
        for chunk in step.chunks:
            request = chunk.request
            request.computed = chunk.end
            for item in request.items:
                if item.range.end <= chunk.end:
                    item.embeds = None

    def _take(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> None:
        """Add a sampled token; end the request if it was the last."""
        request.append(token)
        self._count(output_tokens=1)
        finish = self._finish_reason(request)
        reason, stop = finish if finish is not None else (None, None)
        reported = () if logprobs is None else (logprobs,)
        self._outputs.append((request.key, EngineOutput((token,), reason, stop, request.cached, reported)))
        if reason is not None:
            self._end(request)

    def _finish_reason(self, request: Request) -> tuple[FinishReason, int | None] | None:
        """Whether the last token ends the output, and which stop token did."""
        params, last = request.params, int(request.tokens[request.num_tokens - 1])
        if request.num_outputs >= params.min_tokens:
            if last in self.model.eos_ids and not params.ignore_eos:
                return "stop", None
            if last in params.stop_token_ids:
                return "stop", last
        return ("length", None) if request.num_outputs >= params.max_tokens else None

    def _end(self, request: Request) -> None:
        del self.requests[request.key]
        self.scheduler.remove(request)

    def _fail_step(self, step: Step) -> None:
        """Nothing of the step can be relied on: end its requests, forget the prefixes that it published."""
        for chunk in step.chunks:
            self._failures.append((chunk.request.key, EngineError("the engine failed while it computed this request")))
            self._end(chunk.request)
        self.pool.clear_prefixes()

    def _count(self, **counts: int) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + count for name, count in counts.items()}
        )


def serve(core: Core, channel: Channel, inbox: queue.SimpleQueue[ToCore]) -> None:
    """Steps while there is work, messages between them; waits for messages where there is none."""
    while True:
        waits = not core.scheduler.has_work
        while waits or not inbox.empty():
            reply = core.handle(inbox.get())
            if reply is not None:
                channel.send(reply)
            waits = False
        if core.scheduler.has_work:
            core.step()
        outputs = core.drain()
        if outputs is not None:
            channel.send(outputs)


def main(descriptor: int) -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(name)s -- %(message)s")
    channel = Channel(socket.socket(fileno=descriptor))
    config = channel.receive()
    if not isinstance(config, EngineConfig):
        raise TypeError(f"the first message is the configuration, got {type(config).__name__}")
    inbox: queue.SimpleQueue[ToCore] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    torch.set_num_threads(config.threads)
    try:
        started = time.perf_counter()
        core = Core(config)
        steps = {"load": time.perf_counter() - started}
    except Exception as error:
        logger.exception("the core cannot start")
        failure = error if isinstance(error, GreenroomError) else EngineError(f"the core cannot start: {error!r}")
        channel.send(StartFailed(failure))
        return
    channel.send(Ready(core.max_model_len, steps))
    serve(core, channel, inbox)


def _read(channel: Channel, inbox: queue.SimpleQueue[ToCore]) -> None:
    """Pass messages on; when the engine is gone, so is its core, whatever it is doing."""
    try:
        while True:
            inbox.put(channel.receive())  # type: ignore[arg-type]
    except EOFError:
        os._exit(0)


def _die_with_parent() -> None:
    """Have the kernel kill this process with the thread that started it, where it offers that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))

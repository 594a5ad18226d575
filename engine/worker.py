"""What the core does: obeys messages, computes steps, collects outputs. Single-threaded, and knows no process."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from engine.admission import Admission
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.encoder_cache import EncoderCache
from engine.grammar import load_grammars, require
from engine.messages import Abort, Call, Compiled, Outputs, Reply, Submit, ToCore
from engine.model import Model
from engine.protocol import EngineOutput, EngineStats, FinishReason, TokenLogprobs
from engine.receiver import ReceiverCache
from engine.request import Request
from engine.sampling import sample
from engine.scheduler import Chunk, Scheduler, Step
from renderer.errors import EngineError, GreenroomError
from renderer.prompt import Tensors, tensor_bytes

logger = logging.getLogger("greenroom.engine.worker")


# A step that prefills delays those that decode: its tokens are bounded so that it takes about a tenth of a second.
_CPU_TOKENS, _DEVICE_TOKENS = 256, 2048


Work = Callable[[], Compiled]


class Worker:
    """The model, its caches and its requests.

    Args:
        beside: Runs slow work in another thread and has its result handled here afterwards; None: it is done at once.
    """

    def __init__(self, config: EngineConfig, beside: Callable[[Work], None] | None = None) -> None:
        self.config = config
        self.model = Model(config)
        self.admission = Admission(config, self.model)
        self._beside = beside
        self._grammars = load_grammars(config.model, config.revision, self.model.vocab_size, self.model.eos_ids)
        self._waiting_for_grammar: set[int] = set()
        self.pool = BlockPool(self.model.num_blocks)
        self.receiver = ReceiverCache()
        self.encoder_cache = EncoderCache(config.encoder_cache_bytes)
        budget = config.max_num_batched_tokens or (_CPU_TOKENS if self.model.device.type == "cpu" else _DEVICE_TOKENS)
        self.scheduler = Scheduler(config, budget, self.pool, self.encoder_cache)
        self.requests: dict[int, Request] = {}
        self._outputs: list[tuple[int, EngineOutput]] = []
        self._failures: list[tuple[int, GreenroomError]] = []
        self._counters: Counter[str] = Counter()

    @property
    def stats(self) -> EngineStats:
        counted = EngineStats(**cast(dict[str, Any], self._counters))
        return replace(
            counted,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + len(self._waiting_for_grammar),
            receiver_items=len(self.receiver),
            receiver_bytes=self.receiver.bytes,
            blocks_used=self.pool.used,
            blocks_total=self.pool.num_blocks,
        )

    def handle(self, message: ToCore | Compiled) -> Reply | None:
        """Obey one message; return the answer that it asks for."""
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                for key in message.keys:
                    self._abort(key, message.silent)
            case Compiled():
                self._compiled(message)
            case Call():
                return self._call(message)
        return None

    def step(self) -> None:
        """Encode, compute and sample what the scheduler plans."""
        step = self.scheduler.schedule()
        self._count(cached_tokens=sum(request.cached for request in step.admitted), encoder_hits=step.encoder_hits)
        if not self._encode(step):
            return
        sampling = [chunk.request for chunk in step.chunks if chunk.samples]
        try:
            tokens, logprobs = self._compute(step.chunks, sampling)
        except torch.AcceleratorError:
            raise  # the device is unusable from here on: the core ends, and another one starts
        except Exception:
            logger.exception("a step of %d requests failed", len(step.chunks))
            self.scheduler.abandon(step)
            self._fail([chunk.request for chunk in step.chunks])
            return
        for chunk in step.chunks:
            chunk.request.advance(chunk.end)
        for request, token, logprob in zip(sampling, tokens, logprobs, strict=True):
            self._take(request, token, logprob)

    def drain(self) -> Outputs | None:
        """Outputs since the last call, all requests together."""
        if not self._outputs and not self._failures:
            return None
        outputs = Outputs(tuple(self._outputs), tuple(self._failures))
        self._outputs, self._failures = [], []
        return outputs

    def reset_cache(self, drop: Sequence[str]) -> None:
        """Empty the encoder and prefix caches, and drop these items of the receiver cache."""
        for key in drop:
            self.receiver.drop(key)
        self.encoder_cache.clear()
        self.pool.clear_prefixes()

    def reload(self, path: str | None) -> None:
        """Take other weights, and forget what was computed with the old ones. Processed items stay.

        Raises:
            EngineError: There are requests, whose keys and values the old weights made.
            RequestError: The weights cannot be taken; the old ones stay.
        """
        if self.requests:
            raise EngineError(f"weights cannot change under {len(self.requests)} requests")
        self.model.reload(path or self.config.model, None if path else self.config.revision)
        self.reset_cache(())

    def reset_counters(self) -> None:
        self._counters.clear()

    def _call(self, message: Call) -> Reply:
        try:
            if message.operation == "reset_cache":
                self.reset_cache(message.drop)
            if message.operation == "reload":
                self.reload(message.weights)
        except GreenroomError as error:
            return Reply(message.number, self.stats, error)
        return Reply(message.number, self.stats)

    def _submit(self, message: Submit) -> None:
        self._count(requests=1)
        sent = [item.tensors for item in message.submission.items if item.tensors is not None]
        self._count(tensors_received=len(sent), tensor_bytes_received=sum(map(tensor_bytes, sent)))
        try:
            tensors = self.receiver.obey(message.submission)
        except EngineError as error:
            self._count(receiver_misses=1)
            self._failures.append((message.key, error))
            return
        try:
            request = self.admission.admit(message, tensors)
        except GreenroomError as error:
            self._failures.append((message.key, error))
            return
        self._count(prompt_tokens=request.num_prompt)
        self.requests[request.key] = request
        if message.params.structured is None:
            self._start(request)
        else:
            self._waiting_for_grammar.add(request.key)
            self._compile(request.key, message.params.structured, request.output_ids.tolist())

    def _compiled(self, message: Compiled) -> None:
        """Start a request whose grammar is there, if it has not been aborted meanwhile."""
        request = self.requests.get(message.key)
        if request is None or message.key not in self._waiting_for_grammar:
            return
        self._waiting_for_grammar.discard(message.key)
        if isinstance(message.result, GreenroomError):
            self._failures.append((message.key, message.result))
            del self.requests[message.key]
            return
        request.grammar = message.result
        self._start(request)

    def _compile(self, key: int, schema: dict[str, Any], prior_output_ids: Sequence[int]) -> None:
        """A large schema takes as long as many steps: it is compiled beside them, where there is a thread for it."""

        def work() -> Compiled:
            try:
                return Compiled(key, require(self._grammars).start(schema, prior_output_ids))
            except GreenroomError as error:
                return Compiled(key, error)
            except Exception:
                logger.exception("a JSON schema cannot be compiled")
                return Compiled(key, EngineError("the JSON schema cannot be compiled"))

        if self._beside is None:
            self._compiled(work())
        else:
            self._beside(work)

    def _start(self, request: Request) -> None:
        reason, stop = self._finish_reason(request) if request.num_outputs else (None, None)
        if reason is not None:
            self._outputs.append((request.key, EngineOutput((), reason, stop)))
            del self.requests[request.key]
            return
        self.scheduler.add(request)

    def _abort(self, key: int, silent: bool) -> None:
        request = self.requests.get(key)
        if request is None:
            return
        self._end(request)
        self._count(aborted=1)
        if not silent:
            self._outputs.append((key, EngineOutput((), "abort", None, request.cached)))

    def _encode(self, step: Step) -> bool:
        """Run the vision encoder over the step's items; False where one of them cannot be encoded.

        Such an item ends the requests that have it. The step is then given up: other requests may share blocks that
        would never be written. They lose nothing that was computed before.
        """
        broken = []
        for items, output in zip(step.encode.values(), self._encode_items(step), strict=True):
            if output is None:
                broken += items
                continue
            self.encoder_cache.put(items[0].cache_key, output)
            for item in items:
                item.embeds = output
        if broken:
            self.scheduler.abandon(step)
            self._fail([request for request in self.requests.values() if any(item in broken for item in request.items)])
        return not broken

    def _encode_items(self, step: Step) -> list[torch.Tensor | None]:
        """All items at once, or one by one where that fails."""
        tensors = [items[0].tensors for items in step.encode.values()]
        self._count(encoder_runs=len(tensors))
        try:
            return [_sound(features) for features in self.model.encode(tensors)] if tensors else []
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("encoding %d items together failed", len(tensors))
        return [self._encode_one(item) for item in tensors]

    def _encode_one(self, tensors: Tensors) -> torch.Tensor | None:
        try:
            return _sound(self.model.encode([tensors])[0])
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("an item cannot be encoded")
            return None

    def _compute(
        self, chunks: Sequence[Chunk], sampling: Sequence[Request]
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        logits = self.model.forward(chunks)
        return sample(logits, sampling, self.model.eos_ids) if sampling else ([], [])

    def _take(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> None:
        """Add a sampled token; end the request if it was the last, or if its grammar has come to nothing."""
        if not request.append(token):
            self._fail([request])
            return
        self._count(output_tokens=1)
        reason, stop = self._finish_reason(request)
        reported = () if logprobs is None else (logprobs,)
        text = reason == "stop" and stop is None and token not in self.model.eos_ids
        self._outputs.append((request.key, EngineOutput((token,), reason, stop, request.cached, reported, text)))
        if reason is not None:
            self._end(request)

    def _finish_reason(self, request: Request) -> tuple[FinishReason | None, int | None]:
        """Why the output ends with its last token, if it does, and which stop token ended it."""
        params, last = request.params, int(request.tokens[request.num_tokens - 1])
        if request.num_outputs >= params.min_tokens:
            if last in self.model.eos_ids and not params.ignore_eos:
                return "stop", None
            if last in params.stop_token_ids:
                return "stop", last
        if request.grammar is not None and request.grammar.ended:
            return "stop", None
        return ("length" if request.num_outputs >= params.max_tokens else None), None

    def _end(self, request: Request) -> None:
        del self.requests[request.key]
        if request.key in self._waiting_for_grammar:
            self._waiting_for_grammar.discard(request.key)
        else:
            self.scheduler.remove(request)

    def _fail(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._failures.append((request.key, EngineError("the engine failed on this request")))
            self._end(request)

    def _count(self, **counts: int) -> None:
        self._counters.update(counts)


def _sound(features: torch.Tensor) -> torch.Tensor | None:
    """None for what is no number: in the blocks it would spread to whoever gets them next, through their masks."""
    return features if bool(torch.isfinite(features).all()) else None

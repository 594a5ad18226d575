"""Where the work of an operation is done: on replicas behind handles, or in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from deployments.admission import Share
from deployments.answers.pieces import Pieces, as_views
from deployments.autoscaling import ENGINE_SEQUENCES, RENDER_SECONDS, SECONDS_PER_REQUEST, Gauge
from deployments.calls import (
    DerenderCall,
    Derendered,
    Event,
    GenerateCall,
    RenderCall,
    ReplicaReport,
    Reply,
    TokenizeCall,
    Tokenized,
    media_bytes,
    text_bytes,
)
from deployments.failover import continued, retried
from deployments.running import answers_of_all, obeyed_by_all, resting, running_replicas, wait_for_replicas
from deployments.tier import Tier
from deployments.tier_handle import TierHandle, crosses_by_reference, own_errors
from deployments.work import call_seconds
from renderer.conversation import media_of
from renderer.errors import CacheMissError, EngineStartingError, IncompleteError, NotSupportedError
from renderer.prompt import RenderedPrompt

if TYPE_CHECKING:
    from deployments.config import RouterConfig
    from deployments.rendering import RenderOnly

logger = logging.getLogger("ray.serve.greenroom")

T = TypeVar("T")
# A cache is cleared between two requests, an engine's between two of its steps.
CLEAR_TIMEOUT_S = 15.0
# What a prompt's answer may take: JSON spells a token in at most 8 bytes, and an image stands for up to 16,000 of them.
ANSWER_BYTES_PER_TEXT_BYTE = 8
ANSWER_BYTES_PER_IMAGE = 128 * 1024
# One token's, the likeliest ones in its place included.
BYTES_PER_LOGPROBS = 1024


class Backend(Protocol):
    """The tiers, as the operations see them. Errors are Greenroom's own or Ray's."""

    async def render(self, tier: Tier, call: RenderCall) -> Reply[tuple[RenderedPrompt, ...]]: ...

    async def render_answer(self, tier: Tier, call: RenderCall) -> Reply[Pieces]: ...

    async def tokenize(self, tier: Tier, call: TokenizeCall) -> Reply[Tokenized]: ...

    async def detokenize(self, tier: Tier, token_ids: tuple[int, ...]) -> Reply[str]: ...

    async def derender(self, tier: Tier, call: DerenderCall) -> Reply[tuple[Derendered, ...]]: ...

    def generate(self, call: GenerateCall) -> AsyncGenerator[Event]:
        """The events of a generation, whatever happens to the replica that began it."""

    async def reports(self) -> Mapping[str, tuple[ReplicaReport, ...]]:
        """Of every running replica that answers in time, by tier; a tier without any has its key."""

    async def clear_mm_cache(self) -> None:
        """Of all running replicas.

        Raises:
            IncompleteError: Some did not do it, or not in time; says how many did.
        """

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End generations by their clients' ids, wherever they run."""

    async def command(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        """What every running engine replica answers to a command that all must carry out.

        Raises:
            NotSupportedError: There is no engine tier.
            GreenroomError: None is running, or one could not; the others did.
        """

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and output together that every tier takes, as far as the replicas have told."""

    def rehearsing(self) -> AbstractContextManager[None]:
        """While this process answers itself: see `rehearsal`."""

    def running(self, tier: Tier) -> int:
        """Replicas of a tier that can be reached, as far as this process knows."""

    def share(self) -> Share:
        """The part of every limit that this process may use."""

    def figures(self) -> dict[str, float]:
        """Means since the last call of the work that this process has for the tiers, for scaling."""


class HandleBackend:
    """The tiers behind their handles; what dies is tried again or continued elsewhere.

    Args:
        share: This router's share of the tiers, of all the routers that have handles to them.
    """

    def __init__(self, handles: Mapping[Tier, Any], config: RouterConfig, share: Callable[[], Share] = Share) -> None:
        self._tiers = {tier: TierHandle(handle) for tier, handle in handles.items()}
        self._config = config
        self._share = share
        self._lengths: dict[str, int] = {}
        self._rendering, self._sequences = Gauge(), Gauge()
        self._rehearses = False
        self._opening: frozenset[asyncio.Task[None]] = frozenset()

    async def render(self, tier: Tier, call: RenderCall) -> Reply[tuple[RenderedPrompt, ...]]:
        reply: Reply[tuple[RenderedPrompt, ...]] = await self._pure(
            tier, "render", call, render_crosses_by_reference(call)
        )
        return reply

    async def render_answer(self, tier: Tier, call: RenderCall) -> Reply[Pieces]:
        by_reference = render_crosses_by_reference(call)
        if self._rehearses:
            reply = await self._any_running(tier).call("rehearse", call, by_reference=by_reference)
        else:
            reply = await self._pure(tier, "render_answer", call, by_reference)
        return Reply(as_views(reply.value), reply.served)

    async def tokenize(self, tier: Tier, call: TokenizeCall) -> Reply[Tokenized]:
        by_reference = crosses_by_reference(media_bytes(call.request), text_bytes(call.request) * 8)
        reply: Reply[Tokenized] = await self._pure(tier, "tokenize", call, by_reference)
        return reply

    async def detokenize(self, tier: Tier, token_ids: tuple[int, ...]) -> Reply[str]:
        by_reference = crosses_by_reference(8 * len(token_ids), 16 * len(token_ids))
        reply: Reply[str] = await self._pure(tier, "detokenize", token_ids, by_reference)
        return reply

    async def derender(self, tier: Tier, call: DerenderCall) -> Reply[tuple[Derendered, ...]]:
        tokens = sum(8 * len(output.token_ids) + BYTES_PER_LOGPROBS * len(output.logprobs) for output in call.outputs)
        by_reference = crosses_by_reference(tokens, 2 * tokens)
        reply: Reply[tuple[Derendered, ...]] = await self._pure(tier, "derender", call, by_reference)
        return reply

    def generate(self, call: GenerateCall) -> AsyncGenerator[Event]:
        engine = self._tiers[Tier.ENGINE]
        size = media_bytes(call.request) + text_bytes(call.request)
        by_reference = crosses_by_reference(size, 0)
        events = continued(
            call,
            lambda rest: engine.stream("generate", rest, by_reference),
            self._config.failover_s,
            max(self.running(Tier.ENGINE), 1),
        )
        return self._counted(events, len(call.choices))

    def running(self, tier: Tier) -> int:
        return running_replicas(self._tiers[tier].handle) if tier in self._tiers else 0

    def share(self) -> Share:
        return self._share()

    def figures(self) -> dict[str, float]:
        return {RENDER_SECONDS: self._rendering.mean(), ENGINE_SEQUENCES: self._sequences.mean()}

    async def reports(self) -> Mapping[str, tuple[ReplicaReport, ...]]:
        answers = await asyncio.gather(*(handle.broadcast("report") for handle in self._tiers.values()))
        for report in (report for reports in answers for report in reports):
            self._note(report)
        return {str(tier): reports for tier, reports in zip(self._tiers, answers, strict=True)}

    async def clear_mm_cache(self) -> None:
        tiers = [answers_of_all(tier.handle, "clear_mm_cache", CLEAR_TIMEOUT_S) for tier in self._tiers.values()]
        answers = await asyncio.gather(*tiers)
        cleared, asked = sum(len(each.values) for each in answers), sum(each.asked for each in answers)
        if cleared < asked:
            raise IncompleteError(f"{cleared} of {asked} replicas have cleared their media caches; ask again")

    async def abort(self, request_ids: Sequence[str]) -> None:
        if Tier.ENGINE in self._tiers:
            await self._tiers[Tier.ENGINE].broadcast("abort", request_ids)

    async def command(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        if Tier.ENGINE not in self._tiers:
            raise NotSupportedError(f"{method}: this deployment has no engine tier")
        handle = self._tiers[Tier.ENGINE].handle
        with own_errors():
            return await obeyed_by_all(handle, method, self._config.command_s, *arguments)

    async def warm(self) -> None:
        """Open the ways to every tier, by value and by reference, so that no request pays for it.

        Waits for the tiers' first replicas, but not for ever: a tier that never comes must not keep the others away.
        A tier that rests at no replica is left at that; the ways there are opened when it starts.
        """
        opening = {asyncio.create_task(self._open(tier, handle)): tier for tier, handle in self._tiers.items()}
        at_rest = await resting([handle.handle for handle in self._tiers.values()])
        awaited = [task for task, rests in zip(opening, at_rest, strict=True) if not rests]
        late = (await asyncio.wait(awaited, timeout=self._config.tier_wait_s))[1] if awaited else set()
        for task in late:
            logger.warning("router: no replica of the %s tier was there in time", opening[task])
        self._opening = frozenset(opening)

    async def _open(self, tier: Tier, handle: TierHandle) -> None:
        """Once there is a replica, by value and by reference."""
        await wait_for_replicas(handle.handle)
        for by_reference in (False, True):
            try:
                self._note(await handle.call("report", by_reference=by_reference))
            except Exception as error:  # it went again: the next call finds another, or the tier's failure
                logger.warning("router: a way to the %s tier could not be warmed: %s", tier, type(error).__name__)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Tiers send answers meanwhile for which they do nothing: they may be at work for others already."""
        self._rehearses = True
        try:
            yield
        finally:
            self._rehearses = False

    @property
    def max_model_len(self) -> int | None:
        return min(self._lengths.values(), default=None)

    def _any_running(self, preferred: Tier) -> TierHandle:
        """A tier that can answer now: to call another would make it start."""
        for tier in (preferred, *self._tiers):
            if self.running(tier):
                return self._tiers[tier]
        raise EngineStartingError("no tier has a replica yet")

    def _note(self, report: ReplicaReport) -> None:
        if report.max_model_len is not None:
            self._lengths[report.tier] = report.max_model_len

    async def _pure(self, tier: Tier, method: str, argument: Any, by_reference: bool) -> Any:
        handle = self._tiers[tier]
        seconds = call_seconds(argument) if isinstance(argument, RenderCall | TokenizeCall) else SECONDS_PER_REQUEST
        with self._rendering.under_way(seconds):
            try:
                return await retried(
                    lambda: handle.call(method, argument, by_reference=by_reference), self._config.render_attempts
                )
            except CacheMissError:
                # What comes by its name alone is known to the replica that it was sent to, and that may be another.
                answers = await handle.broadcast(method, argument)
                if not answers:
                    raise
                return answers[0]

    async def _counted(self, events: AsyncGenerator[Event], choices: int) -> AsyncGenerator[Event]:
        with self._sequences.under_way(choices):
            async with aclosing(events):
                async for event in events:
                    yield event


class LocalBackend:
    """A render replica that is its own ingress: no hop, no engine."""

    def __init__(self, replica: RenderOnly) -> None:
        self._replica = replica

    async def render(self, tier: Tier, call: RenderCall) -> Reply[tuple[RenderedPrompt, ...]]:
        return await self._replica.render(call)

    async def render_answer(self, tier: Tier, call: RenderCall) -> Reply[Pieces]:
        return await self._replica.answer_pieces(call)

    def rehearsing(self) -> AbstractContextManager[None]:
        return nullcontext()  # nobody is at work here yet

    async def tokenize(self, tier: Tier, call: TokenizeCall) -> Reply[Tokenized]:
        return await self._replica.tokenize(call)

    async def detokenize(self, tier: Tier, token_ids: tuple[int, ...]) -> Reply[str]:
        return await self._replica.detokenize(token_ids)

    async def derender(self, tier: Tier, call: DerenderCall) -> Reply[tuple[Derendered, ...]]:
        return await self._replica.derender(call)

    def generate(self, call: GenerateCall) -> AsyncGenerator[Event]:
        raise NotSupportedError("this deployment only renders")

    async def reports(self) -> Mapping[str, tuple[ReplicaReport, ...]]:
        return {}

    async def clear_mm_cache(self) -> None:
        await self._replica.clear_mm_cache()

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Nothing is generated here."""

    async def command(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        raise NotSupportedError(f"{method}: this deployment has no engine tier")

    @property
    def max_model_len(self) -> int | None:
        return self._replica.renderer.max_model_len

    def running(self, tier: Tier) -> int:
        return int(tier is Tier.RENDER)

    def share(self) -> Share:
        return Share()  # a replica's limits are its own

    def figures(self) -> dict[str, float]:
        return {}


def render_crosses_by_reference(call: RenderCall) -> bool:
    media, text, pictures = media_bytes(call.request), text_bytes(call.request), len(media_of(call.request))
    answer = ANSWER_BYTES_PER_TEXT_BYTE * text + ANSWER_BYTES_PER_IMAGE * pictures
    return crosses_by_reference(media + text, answer, tensors_back=call.tensors and pictures > 0)

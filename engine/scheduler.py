"""Who computes which tokens in the next step.

Every running request takes part in every step: one that decodes with one token, one that prefills with a chunk of what
the token budget leaves. Decoding comes first, so a long prompt delays others by one bounded step at a time. Waiting
requests are admitted in their order, each when the blocks that it could come to need are available; blocks are reserved
then, so nothing that runs is ever stopped for memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.encoder_cache import EncoderCache
from engine.request import Request, RequestItem


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` of a request. The last one's successor is sampled if the request ends there."""

    request: Request
    start: int
    end: int

    @property
    def samples(self) -> bool:
        return self.end == self.request.num_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether it is one token of the output, which needs no item."""
        return self.samples and self.start >= self.request.num_prompt and self.end - self.start == 1

    @property
    def items(self) -> list[RequestItem]:
        """Items that it reaches into."""
        return [item for item in self.request.items if item.range.offset < self.end and item.range.end > self.start]


@dataclass(slots=True)
class Step:
    """One step.

    Attributes:
        chunks: What is computed, single tokens first.
        encode: Items to encode before that, by cache key; equal ones are encoded once.
        admitted: Requests whose first step it is.
        encoder_hits: Items whose embeddings were there, or will be by then.
    """

    chunks: list[Chunk] = field(default_factory=list)
    encode: dict[str, list[RequestItem]] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)
    encoder_hits: int = 0


class Scheduler:
    """
    Args:
        budget: Tokens of one step at most; encoder outputs too, though always those of one item.
    """

    def __init__(self, config: EngineConfig, budget: int, pool: BlockPool, encoder_cache: EncoderCache) -> None:
        self._pool = pool
        self._encoder_cache = encoder_cache
        self._block_size = config.block_size
        self.budget = budget
        # Each running request gets at least one token a step, so there are never more of them than the budget has.
        self._max_running = min(config.max_num_seqs, budget)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands, and give back what it holds."""
        if request in self.running:
            self.running.remove(request)
            self._pool.release(request.blocks, len(request.block_table) - request.num_blocks)
        else:
            self.waiting.remove(request)

    def abandon(self, step: Step) -> None:
        """The step is not computed: what it published is not true. Whoever was admitted in it may rely on that, and
        waits again; the others go on from where they are."""
        self._pool.clear_prefixes()
        for request in reversed(step.admitted):
            self.remove(request)
            request.num_blocks = request.published = request.computed = request.cached = 0
            self.waiting.appendleft(request)

    def schedule(self) -> Step:
        step = Step()
        budget, embeds = self.budget, self.budget
        decoding = [request for request in self.running if request.is_decoding]
        prefilling = [request for request in self.running if not request.is_decoding]
        slack = budget - len(self.running)
        for request in decoding:
            self._plan(step, request, request.num_tokens)
        for request in prefilling:
            used = self._prefill(step, request, slack + 1, embeds)
            slack, embeds = slack + 1 - used[0], embeds - used[1]
        while self.waiting and slack > 0 and len(self.running) < self._max_running and self._admit(step):
            used = self._prefill(step, self.running[-1], slack, embeds)
            slack, embeds = slack - used[0], embeds - used[1]
        step.chunks.sort(key=lambda chunk: chunk.end - chunk.start > 1)
        return step

    def _admit(self, step: Step) -> bool:
        """Move the first waiting request to the running ones if the blocks that it may need are available."""
        request = self.waiting[0]
        # The last token is always computed: its logits are what the first step is for.
        hashes = request.hash_blocks((request.num_tokens - 1) // self._block_size, self._block_size)
        shared = self._pool.match(hashes)
        if not self._pool.admit(shared, len(request.block_table) - len(shared)):
            return False
        request.block_table[: len(shared)] = shared
        request.num_blocks = request.published = len(shared)
        request.computed = len(shared) * self._block_size
        request.cached = min(request.computed, request.num_prompt)
        self.running.append(self.waiting.popleft())
        step.admitted.append(request)
        return True

    def _prefill(self, step: Step, request: Request, budget: int, embeds: int) -> tuple[int, int]:
        """Plan a chunk of at most `budget` tokens; return the tokens and the encoder outputs that it takes."""
        end = min(request.num_tokens, request.computed + budget)
        encoded = 0
        for item in request.items:
            if item.range.end <= request.computed or item.embeds is not None:
                continue
            if item.range.offset >= end:
                break
            if self._find_embeds(step, item):
                continue
            if encoded + item.range.num_embeds > embeds and not (step.encode == {} and encoded == 0):
                end = max(item.range.offset, request.computed)
                break
            step.encode[item.cache_key] = [item]
            encoded += item.range.num_embeds
        if end > request.computed:
            self._plan(step, request, end)
        return end - request.computed, encoded

    def _find_embeds(self, step: Step, item: RequestItem) -> bool:
        """Whether the item's embeddings are here, or will be once the step's items are encoded."""
        if item.cache_key in step.encode:
            step.encode[item.cache_key].append(item)
        else:
            item.embeds = self._encoder_cache.get(item.cache_key)
            if item.embeds is None:
                return False
        step.encoder_hits += 1
        return True

    def _plan(self, step: Step, request: Request, end: int) -> None:
        """Add a chunk, with blocks for it. Full blocks are published at once: whoever shares one is in this step too,
        where keys and values are written before any are read, or in a later one."""
        while request.num_blocks * self._block_size < end:
            request.block_table[request.num_blocks] = self._pool.take()
            request.num_blocks += 1
        full = end // self._block_size
        for index in range(request.published, full):
            digest = request.hash_blocks(index + 1, self._block_size)[index]
            self._pool.publish(int(request.block_table[index]), digest)
        request.published = max(request.published, full)
        step.chunks.append(Chunk(request, request.computed, end))

"""The render tier as those see it that have items processed there."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from deployments.borrowing.detached import detach
from deployments.calls import BorrowCall
from deployments.running import running_replicas, wait_for_replicas
from deployments.tier_handle import TierHandle, crosses_by_reference
from renderer.caches import ProcessedItem
from renderer.media import MediaItem

logger = logging.getLogger("ray.serve.greenroom")

PAUSE_S = 1.0
# Below, tensors are faster by value; above, by reference, which lends them uncopied. Where that is is not sharp.
TENSORS_BY_VALUE_BYTES = 1024 * 1024
_MAX_SIZES = 4096


class RenderTier:
    """Calls to whichever render replica is the least busy.

    The handle has the default request router: Serve's own ones apart, a router that prefers some replica would let the
    concurrent calls of one request wait for each other.

    Args:
        handle: Finds the tier's handle, which a replica of the tier itself has only once it is running.
        skip_mm_cache: Which processor is used there.
        itself: Whether the caller is one of the tier's replicas.
    """

    def __init__(self, handle: Callable[[], Any], skip_mm_cache: bool, itself: bool = False) -> None:
        self._find = handle
        self._skip_mm_cache = skip_mm_cache
        self._itself = itself
        self._tier: TierHandle | None = None
        self._sizes = _Sizes()
        self._warming: asyncio.Task[None] | None = None

    def open(self) -> None:
        """See `helpers.HelperTier`."""
        self._warming = asyncio.create_task(self.warm())

    def replicas(self) -> int:
        """Others that can be reached; 0 while the ways there are not warm."""
        running = 0 if self._tier is None else running_replicas(self._tier.handle)
        return max(0, running - self._itself)

    async def process(self, item: MediaItem) -> ProcessedItem:
        """See `helpers.HelperTier`. Called in a task of its own."""
        if self._tier is None:
            raise RuntimeError("the render tier is not reached yet")
        detach()
        expected = self._sizes.expected(item)
        by_reference = crosses_by_reference(len(item.data or b""), 0, expected > TENSORS_BY_VALUE_BYTES)
        call = BorrowCall(item, self._skip_mm_cache, counted=self._itself)
        processed: ProcessedItem = await self._tier.call("process_item", call, by_reference=by_reference)
        self._sizes.learn(item, processed.nbytes)
        return processed

    async def warm(self) -> None:
        """Open the ways, by value and by reference, as soon as there is a replica."""
        while True:
            try:
                tier = TierHandle(self._find())
                await wait_for_replicas(tier.handle)
                for by_reference in (False, True):
                    await tier.call("report", by_reference=by_reference)
                self._tier = tier
                return
            except Exception as error:
                logger.info("the render tier is not reached yet: %s", type(error).__name__)
                await asyncio.sleep(PAUSE_S)


class _Sizes:
    """Bytes of tensors by size of image and options, which determine them. Used from one event loop."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, int] = OrderedDict()

    def expected(self, item: MediaItem) -> int:
        """Of an image like none before, more than goes by value: a guess too low would not arrive."""
        return self._known.get(_kind(item), TENSORS_BY_VALUE_BYTES + 1)

    def learn(self, item: MediaItem, nbytes: int) -> None:
        self._known[_kind(item)] = nbytes
        if len(self._known) > _MAX_SIZES:
            self._known.popitem(last=False)


def _kind(item: MediaItem) -> tuple[int, int, str]:
    return item.size.width, item.size.height, repr(sorted(item.options.items()))

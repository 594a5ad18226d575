"""Where an item that no cache holds is computed: in this process' threads, or by whoever else is asked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from renderer.caches import ProcessedItem
from renderer.media import MediaItem


class ItemSource(Protocol):
    """How a processor gets the items that its cache lacks. Thread-safe; the answer never depends on who computes it."""

    def compute(self, item: MediaItem, of: int, local: Callable[[], Future[ProcessedItem]]) -> Future[ProcessedItem]:
        """Begin the work on one item, and return at once.

        Args:
            of: How many items its request has.
            local: Begins it in this process' threads.

        Returns:
            The item, or the error that its request gets. Where nobody waits for it any more it is cancelled, which ends
            work that has not begun.
        """


class LocalItems:
    """Every item in this process' threads."""

    def compute(self, item: MediaItem, of: int, local: Callable[[], Future[ProcessedItem]]) -> Future[ProcessedItem]:
        return local()

"""What callers' names for images stand for."""

from __future__ import annotations

import threading
from collections import OrderedDict

from renderer.prompt import ImageSize


class Names:
    """The content that a tenant's uuid stands for, of the last `capacity` uuids. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._content: OrderedDict[str, tuple[str, ImageSize]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, name: str, cache_key: str, size: ImageSize) -> None:
        with self._lock:
            self._content[name] = (cache_key, size)
            self._content.move_to_end(name)
            if len(self._content) > self._capacity:
                self._content.popitem(last=False)

    def recall(self, name: str) -> tuple[str, ImageSize] | None:
        with self._lock:
            if name in self._content:
                self._content.move_to_end(name)
            return self._content.get(name)

    def clear(self) -> None:
        with self._lock:
            self._content.clear()

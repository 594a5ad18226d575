"""The receiver cache: the engine's store of processed items, which does what the sender cache says."""

from __future__ import annotations

from renderer.caches import Submission
from renderer.errors import EngineError
from renderer.prompt import Tensors, tensor_bytes


class ReceiverCache:
    """Items by cache key. It decides nothing: what comes in and what goes is in the submissions."""

    def __init__(self) -> None:
        self._items: dict[str, Tensors] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def keys(self) -> frozenset[str]:
        return frozenset(self._items)

    def obey(self, submission: Submission) -> tuple[Tensors, ...]:
        """Drop, then take the items in order; return each item's tensors.

        Raises:
            EngineError: An item has no tensors and is not held. The rest of the submission is carried out all the same.
        """
        for key in submission.drop:
            self.drop(key)
        came: dict[str, Tensors] = {}
        missing = []
        for item in submission.items:
            if item.tensors is not None:
                came[item.cache_key] = item.tensors
                if item.keep:
                    self._keep(item.cache_key, item.tensors)
            elif item.cache_key in self._items:
                came[item.cache_key] = self._items[item.cache_key]
            elif item.cache_key not in came:
                missing.append(item.cache_key)
        if missing:
            raise EngineError(f"items that the engine should hold are not there: {', '.join(missing)}")
        return tuple(came[item.cache_key] for item in submission.items)

    def _keep(self, key: str, tensors: Tensors) -> None:
        self.drop(key)
        self._items[key] = tensors
        self.bytes += tensor_bytes(tensors)

    def drop(self, key: str) -> None:
        tensors = self._items.pop(key, None)
        if tensors is not None:
            self.bytes -= tensor_bytes(tensors)

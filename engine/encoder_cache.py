"""The encoder cache: outputs of the vision encoder by cache key, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict

import torch


class EncoderCache:
    """Least recently used goes first. Requests that still need an output hold it themselves."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._outputs: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._outputs)

    def get(self, key: str) -> torch.Tensor | None:
        """Embeddings [tokens, features] of an item, if they are here."""
        output = self._outputs.get(key)
        if output is not None:
            self._outputs.move_to_end(key)
        return output

    def put(self, key: str, output: torch.Tensor) -> None:
        if output.nbytes > self._capacity or key in self._outputs:
            return
        self._outputs[key] = output
        self.bytes += output.nbytes
        while self.bytes > self._capacity:
            _, oldest = self._outputs.popitem(last=False)
            self.bytes -= oldest.nbytes

    def clear(self) -> None:
        self._outputs.clear()
        self.bytes = 0

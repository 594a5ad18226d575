"""What a golden file keeps of a tensor: its form, a digest of its bytes and, of floats, some values.

Floats of two implementations may differ by one unit in the last place, which no digest can tell from a greater
difference: where digests differ, `SAMPLES` values at fixed places are compared.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

SAMPLES = 96
_TENSOR = 3


def summary(tensor: torch.Tensor) -> dict[str, Any]:
    """Form, digest and, of floats, values at even distances."""
    kept: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if tensor.numel() == 1 and not tensor.is_floating_point():
        return {**kept, "value": int(tensor)}
    kept["digest"] = blake3(_bytes(tensor)).hexdigest(length=16)
    if tensor.is_floating_point():
        kept["samples"] = samples(tensor).tolist()
    return kept


def samples(tensor: torch.Tensor) -> NDArray[np.float32]:
    """float32 [SAMPLES], or fewer of a small tensor."""
    flat = tensor.reshape(-1)
    places = np.unique(np.linspace(0, flat.numel() - 1, SAMPLES).astype(np.int64))
    values: NDArray[np.float32] = flat[torch.from_numpy(places)].float().numpy()
    return values


def decode_item(data: bytes) -> dict[str, Any]:
    """One entry of `kwargs_data`: name -> summary and field."""
    item = msgpack.unpackb(data, ext_hook=_extension, strict_map_key=False)
    return {
        name: {**summary(_tensor(element["data"])), "field": _field(element["field"])}
        for name, element in sorted(item.items())
    }


def _field(field: list[Any]) -> list[Any]:
    """Its name, and whether it is kept on the host; what else it says depends on the company it was processed in."""
    name, options = field
    return [name, bool(options.get("keep_on_cpu"))]


def _extension(code: int, payload: bytes) -> bytes:
    if code != _TENSOR:
        raise ValueError(f"extension {code} in an item")
    return payload


def _tensor(value: Any) -> torch.Tensor:
    dtype, shape, payload = value
    if not payload:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(bytearray(payload), dtype=getattr(torch, dtype)).reshape(shape)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """No copy, as masks are large."""
    flat: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.data

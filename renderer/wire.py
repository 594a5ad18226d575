"""Items of a rendered prompt on the wire: tensors to MessagePack and back, strict both ways; never pickle.

    item   = map { name: { "data": tensor, "field": [kind, { ... }] } }
    tensor = [dtype, shape, extension 3: the elements, row-major, little-endian]

Each item travels as the base64 of one such value. What the decoder takes is what the encoder writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import msgpack
import numpy as np
import pybase64
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from renderer.errors import RequestError
from renderer.family import Field, FieldKind
from renderer.prompt import Tensors
from renderer.strict_msgpack import ELEMENTS, MalformedError, unpacked

FloatType = Literal["bfloat16", "float16", "float32"]

_DTYPES: dict[str, Any] = {
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
    "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "bool": np.dtype("?"),
}
_BFLOAT16 = np.dtype("<u2")
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Of each kind of field: its name, the arguments that it takes, and those that it needs.
_KINDS: dict[str, tuple[FieldKind, set[str], set[str]]] = {
    "batched": ("batched", {"keep_on_cpu"}, set()),
    "flat": ("flat", {"keep_on_cpu", "slices", "dim"}, {"slices"}),
    "shared": ("shared", {"keep_on_cpu", "batch_size"}, {"batch_size"}),
}


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What the decoder takes of one item.

    Attributes:
        max_bytes: Of its MessagePack value, and of all its tensors once decoded; no more is allocated in sum.
        max_tensors: How many it may have.
        max_dimensions: Of one tensor.
    """

    max_bytes: int = 256 * 1024 * 1024
    max_tensors: int = 32
    max_dimensions: int = 8


@dataclass(frozen=True, slots=True)
class WireItem:
    """A decoded item: its tensors, read-only, and how an engine joins them.

    bfloat16 is widened to float32; others are views of the bytes that were decoded where their alignment allows.
    """

    tensors: Tensors
    fields: Mapping[str, Field]


def encode_item(tensors: Tensors, fields: Mapping[str, Field], float_type: FloatType = "bfloat16") -> bytes:
    """One item as MessagePack.

    Args:
        float_type: What float32 tensors become.

    Raises:
        ValueError: A tensor has no field, or a dtype that the wire does not know.
    """
    return b"".join(item_parts(tensors, fields, float_type))


def encode_metadata(tensors: Tensors, fields: Mapping[str, Field]) -> bytes | None:
    """The tensors that an engine reads on its host, in the same coding; None where the family has none."""
    metadata = {name: tensors[name] for name, field in fields.items() if field.keep_on_cpu}
    return encode_item(metadata, fields) if metadata else None


def decode_item(data: bytes, limits: WireLimits) -> WireItem:
    """Read one item.

    Raises:
        RequestError: It is malformed, or beyond the limits.
    """
    if len(data) > limits.max_bytes:
        _refuse(f"it has {len(data)} bytes, more than {limits.max_bytes}")
    value = _unpacked(data)
    if not isinstance(value, dict) or not 0 < len(value) <= limits.max_tensors:
        _refuse(f"it must be a map of 1 to {limits.max_tensors} tensors")
    for name, element in value.items():
        if not isinstance(element, dict) or element.keys() != {"data", "field"}:
            _refuse(f"{name!r} must be a map of data and field")
    decoded = sum(_decoded_bytes(element["data"]) for element in value.values())
    if decoded > limits.max_bytes:
        _refuse(f"its tensors have {decoded} bytes once decoded, more than {limits.max_bytes}")
    tensors: dict[str, NDArray[Any]] = {}
    fields: dict[str, Field] = {}
    for name, element in value.items():
        tensors[name] = _tensor(name, element["data"], limits)
        fields[name] = _field(name, element["field"])
    return WireItem(tensors, fields)


def decode_base64(text: str, limits: WireLimits) -> WireItem:
    """Read one item from base64.

    Raises:
        RequestError: It is malformed, or beyond the limits.
    """
    if len(text) > 4 * (limits.max_bytes // 3 + 1):
        _refuse(f"it has more than {limits.max_bytes} bytes")
    try:
        data = pybase64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(f"features.kwargs_data: its base64 is malformed: {error}", "features") from error
    return decode_item(data, limits)


def item_parts(
    tensors: Tensors, fields: Mapping[str, Field], float_type: FloatType = "bfloat16"
) -> Iterator[bytes | memoryview]:
    """What `encode_item` gives, in parts; the elements of a tensor are a part of their own, which is not copied."""
    packer = msgpack.Packer()
    yield packer.pack_map_header(len(tensors))
    for name, tensor in tensors.items():
        if name not in fields:
            raise ValueError(f"{name!r} has no field")
        dtype, elements = _wire_elements(np.asarray(tensor), float_type)
        yield packer.pack(name) + packer.pack_map_header(2) + packer.pack("data") + packer.pack_array_header(3)
        yield packer.pack(dtype) + packer.pack(list(np.shape(tensor)))
        yield _extension_header(elements.nbytes)
        yield elements.reshape(-1).view(np.uint8).data
        yield packer.pack("field") + packer.pack([fields[name].kind, _field_arguments(fields[name], tensor)])


def _wire_elements(tensor: NDArray[Any], float_type: FloatType) -> tuple[str, NDArray[Any]]:
    contiguous = np.ascontiguousarray(tensor)
    if tensor.dtype == np.float32 and float_type != "float32":
        return float_type, _halved(contiguous, _HALVES[float_type])
    for name, dtype in _DTYPES.items():
        if tensor.dtype == dtype:
            return name, contiguous
    raise ValueError(f"tensors of {tensor.dtype} do not travel")


def _halved(tensor: NDArray[np.float32], to: torch.dtype) -> NDArray[np.uint16]:
    """float32 values as a half float's bits, rounded to nearest, ties to even."""
    halves = np.empty(tensor.shape, np.uint16)
    from_dlpack(halves.view(np.int16)).view(to).copy_(from_dlpack(tensor))
    return halves


def _extension_header(length: int) -> bytes:
    fixed = {1: b"\xd4", 2: b"\xd5", 4: b"\xd6", 8: b"\xd7", 16: b"\xd8"}
    if length in fixed:
        return fixed[length] + bytes([ELEMENTS])
    for mark, size in ((b"\xc7", 1), (b"\xc8", 2), (b"\xc9", 4)):
        if length < 256**size:
            return mark + length.to_bytes(size, "big") + bytes([ELEMENTS])
    raise ValueError(f"a tensor of {length} bytes is too large for the wire")


def _field_arguments(field: Field, tensor: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"keep_on_cpu": field.keep_on_cpu}
    if field.kind == "flat":
        arguments |= {"slices": [[[0, len(tensor), None]]], "dim": 0}
    if field.kind == "shared":
        arguments["batch_size"] = 1
    return arguments


def _unpacked(data: bytes) -> Any:
    try:
        return unpacked(data)
    except MalformedError as error:
        raise RequestError(
            f"features.kwargs_data: it is not the MessagePack of an item: {error}", "features"
        ) from error


def _tensor(name: str, value: Any, limits: WireLimits) -> NDArray[Any]:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[2], memoryview):
        _refuse(f"the data of {name!r} must be a tensor")
    dtype_name, shape, elements = value
    dtype = _BFLOAT16 if dtype_name == "bfloat16" else _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        _refuse(f"{name!r} has the unknown dtype {dtype_name!r}")
    if not _is_shape(shape, limits):
        _refuse(f"the shape of {name!r} must be at most {limits.max_dimensions} sizes within {limits.max_bytes} bytes")
    if math.prod(shape) * dtype.itemsize != len(elements):
        _refuse(f"{name!r} has {len(elements)} bytes, which are not of its shape {shape}")
    array = np.frombuffer(elements, dtype).reshape(shape)
    return _from_bfloat16(array) if dtype_name == "bfloat16" else _aligned(array)


def _decoded_bytes(value: Any) -> int:
    """What a tensor's elements have once they are decoded; malformed ones are refused elsewhere."""
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[2], memoryview):
        return 0
    return len(value[2]) * (2 if value[0] == "bfloat16" else 1)


def _from_bfloat16(array: NDArray[np.uint16]) -> NDArray[np.float32]:
    bits = np.empty(array.shape, np.uint32)
    np.left_shift(array, 16, out=bits, dtype=np.uint32)
    bits.flags.writeable = False
    return bits.view(np.float32)


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy where its elements begin anywhere: torch reads them as they lie."""
    if array.flags.aligned:
        return array
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _field(name: str, value: Any) -> Field:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], dict):
        _refuse(f"the field of {name!r} must be a kind and its arguments")
    kind_name, arguments = value
    if not isinstance(kind_name, str) or kind_name not in _KINDS:
        _refuse(f"{name!r} has a field of an unknown kind")
    kind, known, needed = _KINDS[kind_name]
    if not needed <= arguments.keys() <= known or not _are_arguments(**arguments):
        _refuse(f"the field of {name!r} has wrong arguments")
    return Field(kind, arguments.get("keep_on_cpu", False))


def _are_arguments(keep_on_cpu: Any = False, slices: Any = (), dim: Any = 0, batch_size: Any = 1) -> bool:
    """Whether the values are of their types. No reader uses those of `slices` and `batch_size`."""
    return (
        isinstance(keep_on_cpu, bool)
        and isinstance(slices, (list, tuple))
        and type(dim) is int
        and dim == 0
        and type(batch_size) is int
    )


def _is_shape(value: Any, limits: WireLimits) -> bool:
    """Whether it is a list of sizes in bounds, their product too: where one is 0 the others are not to run away."""
    if not isinstance(value, list) or len(value) > limits.max_dimensions:
        return False
    sizes_in_bounds = all(type(size) is int and 0 <= size <= limits.max_bytes for size in value)
    return sizes_in_bounds and math.prod(size or 1 for size in value) <= limits.max_bytes


def _refuse(reason: str) -> NoReturn:
    raise RequestError(f"features.kwargs_data: {reason}", "features")

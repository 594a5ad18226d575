"""Digests of media items, as the wire protocol defines them, and the keys that caches use.

With L(b) = the length of b in 8 bytes, little-endian, and then b, the digest of named values is BLAKE3-256 over

    L(name) value, for each, in the order of the names
    value = 00 | 01 count value* | 02 count (L(key) value)* | 03 leaf        none, sequence, mapping, anything else
    leaf  = L(text) | L(bytes) | L(8 bytes of an int64 or float64) | L(1 byte of a bool) | L("image") value
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3

from renderer.errors import RequestError

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
# What the wire says of an image that is not RGB already: how it becomes RGB.
_RGB_CONVERSION = {"image_mode": "RGB", "rgba_background_color": (255, 255, 255)}


def image_hash(model: str, data: bytes, converted: bool, options: Mapping[str, Any]) -> str:
    """Hash of an image: 64 hex digits over its encoded bytes, the model and the request's processor options.

    Args:
        model: The path or hub id that the renderer was started with.
        data: The encoded file.
        converted: Whether the decoded image is converted to RGB.
        options: `mm_processor_kwargs` of the request.
    """
    hasher = blake3(_framed(b"image") + b"\x03" + _framed(b"image"))
    if converted:
        hasher.update(b"\x02" + _count(2) + _framed(b"io_config") + _value(_RGB_CONVERSION) + _framed(b"data"))
    hasher.update(b"\x03" + _count(len(data)))
    hasher.update(data)
    return _finish(hasher, model, options)


def uuid_hash(model: str, uuid: str, options: Mapping[str, Any]) -> str:
    """What the wire shows for an item with a caller's `uuid`: the uuid, or a digest where options shape the item."""
    if not options:
        return uuid
    return _finish(blake3(_framed(b"image") + _value(uuid)), model, options)


def uuid_key(cache_salt: str | None, uuid: str, options: Mapping[str, Any]) -> str:
    """Key under which a tenant's name for an item is remembered; no content key equals it."""
    return "uuid:" + blake3(_value([cache_salt, uuid, dict(options)])).hexdigest()


def content_key(digest: str) -> str:
    """Cache key of an item whose content was hashed here."""
    return "content:" + digest


def foreign_key(cache_salt: str | None, mm_hash: str, embeds: int) -> str:
    """Cache key of an item that arrived processed: its hash is the caller's claim, good for this tenant alone.

    Args:
        embeds: Its embeddings. Under one claim an item can never answer where another number of them belongs.
    """
    return "foreign:" + blake3(_value([cache_salt, mm_hash, embeds])).hexdigest()


def _finish(hasher: blake3, model: str, options: Mapping[str, Any]) -> str:
    if options:
        hasher.update(_framed(b"mm_processor_kwargs") + _value(options))
    hasher.update(_framed(b"model_id") + _value(model))
    return hasher.hexdigest()


def _count(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _framed(data: bytes) -> bytes:
    return _count(len(data)) + data


def _value(value: Any) -> bytes:
    if value is None:
        return b"\x00"
    if isinstance(value, (str, bytes, int, float)):
        return b"\x03" + _framed(_leaf(value))
    if isinstance(value, Mapping):
        entries = (_framed(str(key).encode()) + _value(inner) for key, inner in value.items())
        return b"\x02" + _count(len(value)) + b"".join(entries)
    if isinstance(value, Sequence):
        return b"\x01" + _count(len(value)) + b"".join(map(_value, value))
    raise RequestError(f"a processor option of type {type(value).__name__} cannot be hashed", "mm_processor_kwargs")


def _leaf(value: str | bytes | int | float) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return struct.pack("<?", value)
    if isinstance(value, float):
        return struct.pack("<d", value)
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise RequestError(f"the processor option {value} does not fit 64 bits", "mm_processor_kwargs")
    return struct.pack("<q", value)

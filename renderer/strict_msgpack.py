"""The part of MessagePack that items on the wire are written in, read strictly and without copies.

That is nil, booleans, integers, texts, arrays, maps with texts for keys, and the elements of tensors (extension 3).
Values become objects many times the size of their bytes, so their number is bounded in sum.
"""

from __future__ import annotations

import struct
from typing import Any, NoReturn

MAX_VALUES = 4096
MAX_DEPTH = 8
MAX_TEXT_BYTES = 128
ELEMENTS = 3

_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_INTEGERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class MalformedError(Exception):
    """The bytes are not one such value."""


def unpacked(data: bytes) -> Any:
    """The one value that `data` holds; elements of tensors are views of `data`.

    Raises:
        MalformedError: It is not MessagePack, has something after it, or holds what items do not.
    """
    reader = _Reader(data)
    value = reader.value(0)
    if reader.position != len(data):
        _refuse("something follows the value")
    return value


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.position = 0
        self._data = memoryview(data)
        self._values = 0

    def value(self, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            _refuse(f"it has more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            _refuse(f"it is nested more than {MAX_DEPTH} deep")
        kind = self._taken(1)[0]
        if kind <= 0x7F or kind >= 0xE0:
            return kind if kind <= 0x7F else kind - 0x100
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if kind in _INTEGERS:
            return struct.unpack(_INTEGERS[kind], self._taken(struct.calcsize(_INTEGERS[kind])))[0]
        return self._compound(kind, depth)

    def _compound(self, kind: int, depth: int) -> Any:
        if kind <= 0x8F or kind in _MAPS:
            return self._map(self._length(kind, 0x0F, _MAPS), depth)
        if kind <= 0x9F or kind in _ARRAYS:
            return [self.value(depth + 1) for _ in range(self._length(kind, 0x0F, _ARRAYS))]
        if kind <= 0xBF or kind in _TEXTS:
            return self._text(self._length(kind, 0x1F, _TEXTS))
        if kind in _FIXED_EXTENSIONS:
            return self._elements(_FIXED_EXTENSIONS[kind])
        if kind in _EXTENSIONS:
            return self._elements(self._length(kind, 0, _EXTENSIONS))
        return _refuse(f"what begins with byte {kind} is not taken")

    def _map(self, length: int, depth: int) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in read:
                _refuse("the keys of a map must be texts, each another")
            read[key] = self.value(depth + 1)
        return read

    def _text(self, length: int) -> str:
        if length > MAX_TEXT_BYTES:
            _refuse(f"a text has more than {MAX_TEXT_BYTES} bytes")
        try:
            return str(self._taken(length), "utf-8")
        except UnicodeDecodeError:
            _refuse("a text is not UTF-8")

    def _elements(self, length: int) -> memoryview:
        code = self._taken(1)[0]
        if code != ELEMENTS:
            _refuse(f"extension {code} is not taken")
        return self._taken(length)

    def _length(self, kind: int, mask: int, sizes: dict[int, int]) -> int:
        """A length that is in the kind's own byte, or in those that follow."""
        return int.from_bytes(self._taken(sizes[kind]), "big") if kind in sizes else kind & mask

    def _taken(self, length: int) -> memoryview:
        start, self.position = self.position, self.position + length
        if self.position > len(self._data):
            _refuse("it is cut off")
        return self._data[start : self.position]


def _refuse(reason: str) -> NoReturn:
    raise MalformedError(reason)

"""Base64 of bytes that lie in parts, which are joined nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pybase64


def base64_parts(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The parts of the base64 of all parts together. What lies across the groups of three bytes is copied, no more."""
    rest = b""
    for part in parts:
        view = memoryview(part)
        if rest:
            taken = 3 - len(rest)
            rest += view[:taken]
            view = view[taken:]
            if len(rest) < 3:
                continue
            yield pybase64.b64encode(rest)
        whole = len(view) // 3 * 3
        if whole:
            yield pybase64.b64encode(view[:whole])
        rest = bytes(view[whole:])
    if rest:
        yield pybase64.b64encode(rest)

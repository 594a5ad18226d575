"""Answers of many megabytes, in pieces that nobody joins: each is written where it lies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from fastapi import Response
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

Piece = bytes | memoryview
Pieces = Sequence[Piece]
# As arrays they cross to another process beside the message, uncopied by the reader.
ArrayPieces = tuple[NDArray[np.uint8], ...]

# Pieces below this are joined: a message of its own costs more than their copy.
SMALL = 64 * 1024
# A view is copied to be sent, as much at a time as the processor's cache holds: Serve's own proxy takes bytes alone.
COPIED = 512 * 1024


def coalesced(pieces: Iterable[Piece]) -> list[Piece]:
    """The same bytes in fewer pieces: the small ones between large ones are joined."""
    joined: list[Piece] = []
    run: list[Piece] = []
    for piece in pieces:
        if len(piece) < SMALL:
            run.append(piece)
            continue
        if run:
            joined.append(b"".join(run))
        joined.append(piece)
        run = []
    return [*joined, b"".join(run)] if run else joined


def as_arrays(pieces: Pieces) -> ArrayPieces:
    """Pieces as they cross to another process."""
    return tuple(np.frombuffer(piece, np.uint8) for piece in pieces)


def as_views(arrays: ArrayPieces) -> Pieces:
    """Pieces that have crossed."""
    return [array.data for array in arrays]


class PiecesResponse(Response):
    """A response whose body is written piece by piece, at the pace of the client."""

    def __init__(self, pieces: Pieces, headers: Mapping[str, str], media_type: str) -> None:
        length = str(sum(map(len, pieces)))
        super().__init__(headers={**headers, "content-length": length}, media_type=media_type)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces:
            for part in [piece] if isinstance(piece, bytes) else _copies(piece):
                await send({"type": "http.response.body", "body": part, "more_body": True})
                # While the socket has room sending waits for nothing, and the tokens of others' streams would.
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})


def _copies(view: memoryview) -> Iterable[bytes]:
    return (bytes(view[start : start + COPIED]) for start in range(0, len(view), COPIED))

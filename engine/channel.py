"""Framed messages over a stream socket between an engine and its core.

A frame is a count of parts, their lengths, and the parts: a pickle (protocol 5) and the buffers of its arrays, which
are written from where they lie and read into the memory that they keep. Pickle is safe here alone: both ends are one
program, and the socket is inherited, not reachable from outside.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Sequence

_COUNT = struct.Struct("<I")
_MAX_VECTORS = 512
_MAX_READ = 1 << 30


class Channel:
    """One end. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Write one message; blocks while the other end does not read.

        Raises:
            OSError: The other end is gone.
        """
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
        sizes = struct.pack(f"<I{len(parts)}Q", len(parts), *(part.nbytes for part in parts))
        with self._sending:
            self._write([memoryview(sizes), *(part for part in parts if part.nbytes)])

    def receive(self) -> object:
        """Read one message; blocks until there is one.

        Raises:
            EOFError: The other end is gone.
        """
        (count,) = _COUNT.unpack(self._read(_COUNT.size))
        sizes = struct.unpack(f"<{count}Q", self._read(8 * count))
        head, *buffers = [self._read(size) for size in sizes]
        return pickle.loads(head, buffers=buffers)

    def close(self) -> None:
        """End both directions: a thread that is blocked in `receive`, here or at the other end, gets EOFError."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        finally:
            self._socket.close()

    def _write(self, parts: Sequence[memoryview]) -> None:
        pending = list(parts)
        first = 0
        while first < len(pending):
            sent = self._socket.sendmsg(pending[first : first + _MAX_VECTORS])
            while first < len(pending) and sent >= pending[first].nbytes:
                sent -= pending[first].nbytes
                first += 1
            if sent:
                pending[first] = pending[first][sent:]

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view.nbytes:
            try:
                got = self._socket.recv_into(view[:_MAX_READ])
            except OSError as error:
                raise EOFError("the channel is closed") from error
            if got == 0:
                raise EOFError("the other end is gone")
            view = view[got:]
        return data

"""Files below one folder, and no others."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class ForbiddenFileError(Exception):
    """The path leads out of the folder, or to something that is not a regular file."""


def size_below(root: Path, path: str) -> int:
    """The size of a file in bytes.

    Args:
        root: The folder that it must lie in once links and `..` are resolved.
        path: Absolute.

    Raises:
        ForbiddenFileError: It does not lie there, whether it exists or not, or is a folder, a device, a pipe.
        OSError: It cannot be opened.
    """
    with _opened(root, path) as descriptor:
        return os.fstat(descriptor).st_size


def read_below(root: Path, path: str, limit: int) -> bytes:
    """The first `limit` bytes of a file.

    Raises:
        ForbiddenFileError, OSError: As `size_below`.
    """
    with _opened(root, path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        return file.read(limit)


@contextmanager
def _opened(root: Path, path: str) -> Iterator[int]:
    if not os.path.isabs(path) or "\0" in path:
        raise ForbiddenFileError
    top, target = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath((top, target)) != top:
        raise ForbiddenFileError
    descriptor = open_below(top, Path(target).relative_to(top).parts)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ForbiddenFileError
        yield descriptor
    finally:
        os.close(descriptor)


def open_below(top: str, parts: Iterable[str]) -> int:
    """Opens what is at `parts` below `top` and returns the descriptor.

    No part may be a link, so what was resolved is what is opened, whoever puts a link in its place meanwhile. Nor does
    the opening wait for the other end of a pipe.

    Raises:
        OSError: A part is a link, or is not there, or may not be read.
    """
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for part in parts:
        try:
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor

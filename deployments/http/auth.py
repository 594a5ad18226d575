"""API keys: where they come from, and whether a request has one."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from renderer.errors import AuthenticationError, ConfigError

logger = logging.getLogger("ray.serve.greenroom")

# The forms of a source. What has none of them may be a key, and keys have no place in a configuration.
SOURCE = r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+|sha256:[0-9a-fA-F]{64})$"
# A key that is added to a file, or taken out of it, counts after so long.
REREAD_S = 5.0


class KeyRing:
    """The API keys of one application, held as digests.

    Args:
        sources: `env:NAME`, a variable of the replica's process that holds keys, separated by commas or blanks;
            `file:PATH`, a file on the replica's node with a key a line; `sha256:DIGEST`, a key's own digest in hex.
            A file is read anew when it changes, so keys are exchanged without a restart.

    Raises:
        ConfigError: A source is missing or holds no key: that nobody could ask is a mistake.
    """

    def __init__(
        self,
        sources: Sequence[str],
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        kinds = [source.partition(":") for source in sources]
        self._fixed = [bytes.fromhex(rest) for kind, _, rest in kinds if kind == "sha256"]
        for name in (rest for kind, _, rest in kinds if kind == "env"):
            self._fixed += _digests(environ.get(name, "").replace(",", " "), f"the environment variable {name}")
        self._files = [_KeyFile(Path(rest), clock) for kind, _, rest in kinds if kind == "file"]

    def check(self, authorization: str | None) -> None:
        """Return if the header `Authorization` carries a key of the ring.

        Every key is compared, each in constant time: how long it takes tells nothing of them.

        Raises:
            AuthenticationError: It does not.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("no API key; send one as `Authorization: Bearer KEY`")
        presented = _digest(key.strip())
        known = [*self._fixed, *(digest for file in self._files for digest in file.digests())]
        if not sum(hmac.compare_digest(presented, each) for each in known):
            raise AuthenticationError("this API key is not known here")


class _KeyFile:
    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._changed = self._change()
        self._looked_at = clock()
        self._digests = self._read()

    def digests(self) -> list[bytes]:
        """Of the keys in the file; those of before while it is gone or empty."""
        if self._clock() - self._looked_at >= REREAD_S:
            self._looked_at = self._clock()
            changed = self._change()
            if changed not in (None, self._changed):
                self._changed = changed
                self._read_again()
        return self._digests

    def _read_again(self) -> None:
        try:
            self._digests = self._read()
        except ConfigError as error:
            logger.warning("%s; the keys of before stay", error)

    def _change(self) -> tuple[int, int] | None:
        """What differs once the file has been written or replaced; None where it cannot be seen."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _read(self) -> list[bytes]:
        try:
            return _digests(self._path.read_text(), f"the file {self._path}")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_keys: cannot read {self._path}: {type(error).__name__}") from error


def _digests(text: str, where: str) -> list[bytes]:
    keys = text.split()
    if not keys:
        raise ConfigError(f"api_keys: {where} holds no key")
    return [_digest(key) for key in keys]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

"""The bare Hugging Face processor of `bare.py`, from outside: a process that answers one request at a time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bench.measure import Spent, Timed


class Bare:
    """One model's processor and tokenizer under one Python, for as long as a `with` block lasts.

    Args:
        python: Of the virtual environment to measure in.
        normalise: Whether it rescales and normalises; False for families whose engine does.

    Attributes:
        backend: Whose arithmetic it is, `torchvision` or `pil`.

    Raises:
        RuntimeError: It ended before it answered.
    """

    def __init__(self, python: Path, model: Path, normalise: bool) -> None:
        self._command = [str(python), str(Path(__file__).parent / "bare.py"), str(model)]
        self._normalise = normalise
        self.backend = ""

    def __enter__(self) -> Bare:
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=quiet, text=True)
        self.backend = str(self._answer(self._process.stdout)["backend"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def request(self, text: str, pictures: Sequence[Path]) -> Timed:
        """A request, to be sent and timed as often as it is called."""
        fields = {"text": text, "pictures": [str(path) for path in pictures], "normalise": self._normalise}
        line = json.dumps(fields) + "\n"

        def run() -> Spent:
            if self._process.stdin is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            return Spent(**self._answer(self._process.stdout))

        return run

    def _answer(self, output: IO[str] | None) -> dict[str, Any]:
        line = "" if output is None else output.readline()
        if not line:
            raise RuntimeError(f"the bare processor ended: {' '.join(self._command)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

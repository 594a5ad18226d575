"""What is sent: render requests whose images nobody has seen before, or has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pybase64

from bench.pictures import data_url, photograph, sentence

TEXT = sentence(60)
# Base64 of bytes that no decoder reads, put after the image: another image for every hash, at no cost for the sender.
_TAIL_BYTES = 9


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of request.

    Attributes:
        sizes: Of its images.
        again: Whether every request has the same images; else each has its own.
        tensors: Whether their tensors are asked for.
        more: Other fields of the body.
    """

    name: str
    sizes: tuple[tuple[int, int], ...] = ()
    again: bool = False
    tensors: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)

    def bodies(self) -> Bodies:
        pictures = [photograph(*size, seed=seed) for seed, size in enumerate(self.sizes)]
        return Bodies(pictures, self.again, self.tensors, self.more)


FOUR = ((1280, 720),) * 4
CASES = (
    Case("text"),
    Case("640x480", ((640, 480),)),
    Case("1920x1080", ((1920, 1080),)),
    Case("4 x 1280x720", FOUR),
    Case("again, 4 x 1280x720", FOUR, again=True),
    Case("layout, 4 x 1280x720", FOUR, tensors=False),
)


class Bodies:
    """JSON bodies of a chat request, made by joining what never changes and a tail for each image. Thread-safe."""

    def __init__(
        self, pictures: Sequence[bytes], again: bool, tensors: bool, more: Mapping[str, Any] | None = None
    ) -> None:
        self._again = again
        self._numbers = count()
        marks = [f"<image {number}>" for number in range(len(pictures))]
        images = [{"type": "image_url", "image_url": {"url": mark}} for mark in marks]
        content = [*images, {"type": "text", "text": TEXT}]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], **(more or {})}
        if not tensors:
            body["mm_payload"] = "none"
        rest = json.dumps(body)
        self._pieces: list[bytes] = []
        for mark, picture in zip(marks, pictures, strict=True):
            before, _, rest = rest.partition(mark)
            whole = picture + bytes(-len(picture) % 3)
            self._pieces.append((before + data_url(whole)).encode())
        self._end = rest.encode()

    def __call__(self) -> bytes:
        pieces: list[bytes] = []
        for place, piece in enumerate(self._pieces):
            number = place if self._again else next(self._numbers)
            pieces += [piece, pybase64.b64encode(number.to_bytes(_TAIL_BYTES, "little"))]
        return b"".join([*pieces, self._end])

    def message(self) -> Mapping[str, Any]:
        """The same as a handle takes it."""
        body: dict[str, Any] = json.loads(self())
        return body

"""Golden files: one a family, gzipped JSON, the same bytes for the same answers."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "recorded"


@cache
def golden(family: str) -> dict[str, Any]:
    """The answers recorded of a family: `peer`, `model`, `pictures` (digests), `cases` and `exchanges` by name."""
    content: dict[str, Any] = json.loads(gzip.decompress(_path(family).read_bytes()))
    return content


def write_golden(family: str, content: dict[str, Any]) -> Path:
    path = _path(family)
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return path


def _path(family: str) -> Path:
    return FOLDER / f"{family}.json.gz"


def pack_ids(ids: list[int]) -> list[int | list[int]]:
    """Runs of one id as [id, length]: placeholders are long."""
    packed: list[int | list[int]] = []
    start = 0
    while start < len(ids):
        end = start + 1
        while end < len(ids) and ids[end] == ids[start]:
            end += 1
        packed += [[ids[start], end - start]] if end - start > 2 else ids[start:end]
        start = end
    return packed


def unpack_ids(packed: list[int | list[int]]) -> list[int]:
    ids: list[int] = []
    for entry in packed:
        ids += [entry] if isinstance(entry, int) else [entry[0]] * entry[1]
    return ids

"""Digests as the wire protocol defines them, written here a second time and plainly."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from renderer.errors import RequestError
from renderer.hashing import content_key, foreign_key, image_hash, uuid_hash, uuid_key

MODEL = "/models/some-vl"
DATA = b"\x89PNG and so on"
CONVERSION = {"image_mode": "RGB", "rgba_background_color": [255, 255, 255]}


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def value(thing: Any) -> bytes:
    if thing is None:
        return b"\x00"
    if isinstance(thing, list):
        return b"\x01" + len(thing).to_bytes(8, "little") + b"".join(value(inner) for inner in thing)
    if isinstance(thing, dict):
        return (
            b"\x02"
            + len(thing).to_bytes(8, "little")
            + b"".join(framed(k.encode()) + value(v) for k, v in thing.items())
        )
    if isinstance(thing, str):
        return b"\x03" + framed(thing.encode())
    if isinstance(thing, bytes):
        return b"\x03" + framed(thing)
    return b"\x03" + framed(np.array(thing).tobytes())


def picture(content: Any) -> bytes:
    return b"\x03" + framed(b"image") + value(content)


def digest(entries: Mapping[str, bytes]) -> str:
    return blake3(b"".join(framed(name.encode()) + entries[name] for name in sorted(entries))).hexdigest()


@pytest.mark.parametrize(
    "options", [{}, {"max_pixels": 50176}, {"size": {"longest_edge": 9, "flags": [True, None, 1.5, "x"]}}]
)
@pytest.mark.parametrize("converted", [False, True])
def test_an_images_hash_is_the_wire_protocols(options: dict[str, Any], converted: bool) -> None:
    content: Any = {"io_config": CONVERSION, "data": DATA} if converted else DATA
    entries = {"image": picture(content), "model_id": value(MODEL)}
    if options:
        entries["mm_processor_kwargs"] = value(options)
    assert image_hash(MODEL, DATA, converted, options) == digest(entries)


def test_everything_that_changes_the_tensors_changes_the_hash() -> None:
    hashes = {
        image_hash(MODEL, DATA, False, {}),
        image_hash(MODEL, DATA + b"!", False, {}),
        image_hash(MODEL, DATA, True, {}),
        image_hash(MODEL + "2", DATA, False, {}),
        image_hash(MODEL, DATA, False, {"max_pixels": 1}),
        image_hash(MODEL, DATA, False, {"max_pixels": 2}),
        image_hash(MODEL, DATA, False, {"max_pixels": 1.0}),
        image_hash(MODEL, DATA, False, {"max_pixels": "1"}),
    }
    assert len(hashes) == 8


def test_a_uuid_is_shown_as_it_is_unless_options_shape_the_item() -> None:
    assert uuid_hash(MODEL, "mine", {}) == "mine"
    shown = uuid_hash(MODEL, "mine", {"max_pixels": 1})
    entries = {"image": value("mine"), "model_id": value(MODEL), "mm_processor_kwargs": value({"max_pixels": 1})}
    assert shown == digest(entries)


def test_key_spaces_never_meet() -> None:
    content = image_hash(MODEL, DATA, False, {})
    keys = {
        content_key(content),
        uuid_key(None, content, {}),
        uuid_key("salt", content, {}),
        uuid_key("other", content, {}),
        uuid_key(None, content, {"max_pixels": 1}),
        foreign_key(None, content, 4),
        foreign_key("salt", content, 4),
        foreign_key("salt", content, 5),
        foreign_key("other", content, 4),
    }
    assert len(keys) == 9


@pytest.mark.parametrize("option", [2**63, object()])
def test_an_option_that_has_no_digest_is_refused(option: Any) -> None:
    with pytest.raises(RequestError):
        image_hash(MODEL, DATA, False, {"max_pixels": option})

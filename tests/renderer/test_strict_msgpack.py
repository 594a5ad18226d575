"""The reader reads what MessagePack's own writer writes, of the kinds that items have, and refuses the rest."""

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from renderer.strict_msgpack import ELEMENTS, MAX_DEPTH, MAX_TEXT_BYTES, MAX_VALUES, MalformedError, unpacked

texts = st.text(max_size=MAX_TEXT_BYTES // 4)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts
    | st.builds(msgpack.ExtType, st.just(ELEMENTS), st.binary(max_size=300)),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(texts, inner, max_size=20),
    max_leaves=30,
)  # fmt: skip


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max((depth(each) + 1 for each in inner), default=0)


@settings(max_examples=50)
@given(values.filter(lambda value: depth(value) <= MAX_DEPTH))
def test_what_is_written_is_read(value: Any) -> None:
    assert unpacked(msgpack.packb(value)) == msgpack.unpackb(
        msgpack.packb(value), ext_hook=lambda _, data: data, strict_map_key=False
    )


@given(st.binary(max_size=60))
def test_what_is_read_is_what_messagepack_reads(data: bytes) -> None:
    try:
        value = unpacked(data)
    except MalformedError:
        return
    assert value == msgpack.unpackb(data, ext_hook=lambda _, elements: elements)


@pytest.mark.parametrize("head", ["dc0001", "dd00000001", "91"])
def test_a_length_may_be_written_longer_than_it_needs(head: str) -> None:
    assert unpacked(bytes.fromhex(head) + b"\x05") == [5]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off"),
        (b"\x92\x01", "cut off"),
        (b"\xa3ab", "cut off"),
        (b"\xd6\x03abc", "cut off"),
        (b"\x01\x02", "something follows"),
        (b"\xc1", "byte 193"),
        (msgpack.packb(1.5), "byte 203"),
        (msgpack.packb(b"abc"), "byte 196"),
        (msgpack.packb(msgpack.ExtType(1, b"abcd")), "extension 1"),
        (msgpack.packb({1: 2}), "keys of a map"),
        (b"\x82\xa1x\x01\xa1x\x02", "each another"),
        (b"\xa1\xff", "not UTF-8"),
        (msgpack.packb("x" * (MAX_TEXT_BYTES + 1)), "a text has more than 128 bytes"),
        (b"\x91" * (MAX_DEPTH + 1) + b"\x01", "nested more than 8 deep"),
        (msgpack.packb([0] * MAX_VALUES), "more than 4096 values"),
        (msgpack.packb([[0] * (MAX_VALUES // 2)] * 2), "more than 4096 values"),
    ],
)
def test_what_items_do_not_hold_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(MalformedError, match=reason):
        unpacked(data)


def test_elements_are_not_copied() -> None:
    data = msgpack.packb(msgpack.ExtType(ELEMENTS, b"abcdefgh"))
    elements = unpacked(data)
    assert isinstance(elements, memoryview)
    assert elements.obj is data

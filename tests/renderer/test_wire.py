"""Items on the wire: byte for byte what the protocol says, and nothing else is read."""

import contextlib
import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pybase64
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from renderer.errors import RequestError
from renderer.family import Field
from renderer.prompt import Tensors
from renderer.wire import FloatType, WireLimits, decode_base64, decode_item, encode_item, encode_metadata

LIMITS = WireLimits(max_bytes=1 << 20)
GRID: Tensors = {"image_grid_thw": np.array([1, 6, 4], np.int64)}
GRID_FIELDS = {"image_grid_thw": Field("batched", keep_on_cpu=True)}
QWEN: Tensors = {"pixel_values": np.arange(24 * 8, dtype=np.uint8).reshape(24, 8), **GRID}
QWEN_FIELDS = {"pixel_values": Field("flat"), **GRID_FIELDS}


def packed(dtype: Any, shape: Any, data: bytes, field: Any = ("batched", {}), code: int = 3) -> bytes:
    element = {"data": [dtype, shape, msgpack.ExtType(code, data)], "field": list(field)}
    item: bytes = msgpack.packb({"x": element})
    return item


def test_an_item_is_these_bytes() -> None:
    expected = bytes.fromhex(
        "81 ae 696d6167655f677269645f746877"
        "82 a4 64617461 93 a5 696e743634 91 03 c7 18 03"
        "0100000000000000 0600000000000000 0400000000000000"
        "a5 6669656c64 92 a7 62617463686564 81 ab 6b6565705f6f6e5f637075 c3"
    )
    assert encode_item(GRID, GRID_FIELDS) == expected
    assert encode_metadata(QWEN, QWEN_FIELDS) == expected


def test_a_flat_field_carries_the_slices_that_readers_ask_for() -> None:
    item = msgpack.unpackb(encode_item(QWEN, QWEN_FIELDS), ext_hook=lambda code, data: (code, data))
    name, arguments = item["pixel_values"]["field"]
    assert name == "flat"
    assert arguments == {"keep_on_cpu": False, "slices": [[[0, 24, None]]], "dim": 0}
    assert item["pixel_values"]["data"] == ["uint8", [24, 8], (3, QWEN["pixel_values"].tobytes())]


def test_a_family_without_host_tensors_has_no_metadata() -> None:
    assert encode_metadata(QWEN, {"pixel_values": Field("flat")}) is None


dtypes = st.sampled_from(["u1", "i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8", "?"])
tensors = dtypes.flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
)
fields = st.builds(Field, st.sampled_from(["batched", "shared"]), st.booleans())


@given(st.dictionaries(st.text(min_size=1, max_size=20), st.tuples(tensors, fields), min_size=1, max_size=4))
def test_what_is_written_is_read(items: dict[str, tuple[Any, Field]]) -> None:
    own_tensors = {name: tensor for name, (tensor, _) in items.items()}
    own_fields = {name: field for name, (_, field) in items.items()}
    decoded = decode_item(encode_item(own_tensors, own_fields, "float32"), LIMITS)
    assert decoded.fields == own_fields
    for name, tensor in own_tensors.items():
        assert decoded.tensors[name].dtype == tensor.dtype
        assert decoded.tensors[name].shape == tensor.shape
        assert decoded.tensors[name].tobytes() == tensor.tobytes()
        assert not decoded.tensors[name].flags.writeable


@pytest.mark.parametrize("length", [0, 1, 2, 4, 5, 8, 16, 17, 255, 256, 65535, 65536])
def test_every_length_of_extension_is_read_by_a_plain_messagepack_reader(length: int) -> None:
    item = encode_item({"x": np.zeros(length, np.uint8)}, {"x": Field("batched")})
    assert msgpack.unpackb(item)["x"]["data"] == ["uint8", [length], msgpack.ExtType(3, bytes(length))]
    assert len(item) == len(packed("uint8", [length], bytes(length), ["batched", {"keep_on_cpu": False}]))


def test_the_order_of_elements_in_memory_does_not_show() -> None:
    tensor = np.arange(12, dtype=np.int32).reshape(3, 4)
    field = {"x": Field("batched")}
    assert encode_item({"x": tensor.T.copy().T}, field) == encode_item({"x": tensor}, field)


@given(arrays.arrays("<u4", st.integers(0, 40)))
def test_half_floats_are_rounded_to_nearest_and_ties_to_even(bits: Any) -> None:
    values = bits.view("<f4")
    upper, below, odd = bits >> 16, bits & 0xFFFF, bits >> 16 & 1
    up = (below > 0x8000) | ((below == 0x8000) & (odd == 1))
    with np.errstate(invalid="ignore", over="ignore"):
        halves: dict[FloatType, Any] = {
            "bfloat16": np.where(np.isnan(values), np.nan, ((upper + up) << 16).view("<f4")),
            "float16": values.astype(np.float16),
        }
    for name, expected in halves.items():
        decoded = decode_item(encode_item({"x": values}, {"x": Field("batched")}, name), LIMITS).tensors["x"]
        np.testing.assert_array_equal(decoded, expected)


def test_float_types() -> None:
    values = np.array([0.1, -2.5, 3e38, 1e-40, np.inf, np.nan], np.float32)
    kinds: tuple[FloatType, ...] = ("bfloat16", "float16", "float32")
    for float_type in kinds:
        item = encode_item({"x": values}, {"x": Field("batched")}, float_type)
        assert msgpack.unpackb(item)["x"]["data"][0] == float_type


def test_a_tensor_without_a_field_or_of_a_strange_type_is_not_written() -> None:
    with pytest.raises(ValueError, match="no field"):
        encode_item(QWEN, GRID_FIELDS)
    with pytest.raises(ValueError, match="complex64"):
        encode_item({"x": np.zeros(1, np.complex64)}, {"x": Field("batched")})


MALFORMED = {
    "nothing": b"",
    "not MessagePack": b"\xc1",
    "cut off": packed("uint8", [3], b"abc")[:-1],
    "something after it": packed("uint8", [3], b"abc") + b"\x00",
    "not a map": msgpack.packb([1]),
    "an empty map": msgpack.packb({}),
    "a key that is no text": msgpack.packb({1: {}}),
    "no field": msgpack.packb({"x": {"data": ["uint8", [0], msgpack.ExtType(3, b"")]}}),
    "one thing more": msgpack.packb(
        {"x": {"data": ["uint8", [0], msgpack.ExtType(3, b"")], "field": ["batched", {}], "y": 1}}
    ),
    "a pickle": packed("uint8", [3], b"abc", code=1),
    "a timestamp": msgpack.packb(msgpack.Timestamp(1)),
    "a timestamp for elements": packed("uint8", [4], b"abcd").replace(b"\xd6\x03", b"\xd6\xff"),
    "a number for a tensor": msgpack.packb({"x": {"data": 1, "field": ["batched", {}]}}),
    "a list of tensors": msgpack.packb(
        {"x": {"data": [["uint8", [0], msgpack.ExtType(3, b"")]], "field": ["batched", {}]}}
    ),
    "an unknown dtype": packed("complex64", [1], bytes(8)),
    "a dtype that is no text": packed(7, [1], b"a"),
    "a shape that is no list": packed("uint8", 3, b"abc"),
    "a negative side": packed("uint8", [-3], b"abc"),
    "a side that is no number": packed("uint8", [True, 3], b"abc"),
    "a huge side": packed("uint8", [2**62, 4], b""),
    "too many dimensions": packed("uint8", [1] * 9, b"a"),
    "too few bytes": packed("int64", [3], bytes(23)),
    "too many bytes": packed("int64", [3], bytes(25)),
    "an unknown field": packed("uint8", [1], b"a", ["ragged", {}]),
    "a field without arguments": packed("uint8", [1], b"a", ["batched"]),
    "a flat field without slices": packed("uint8", [1], b"a", ["flat", {}]),
    "slices that are none": packed("uint8", [1], b"a", ["flat", {"slices": 3}]),
    "a flat field along another dimension": packed("uint8", [1, 1], b"a", ["flat", {"slices": [], "dim": 1}]),
    "a shared field without a size": packed("uint8", [1], b"a", ["shared", {}]),
    "an unknown argument": packed("uint8", [1], b"a", ["batched", {"gpu": True}]),
    "a flag that is none": packed("uint8", [1], b"a", ["batched", {"keep_on_cpu": 1}]),
    "deep nesting": b"\x91" * 100_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_item_is_the_callers_fault(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_item(MALFORMED[name], LIMITS)
    assert caught.value.param == "features"


def test_an_item_beyond_the_limits_is_refused() -> None:
    item = encode_item(QWEN, QWEN_FIELDS)
    with pytest.raises(RequestError, match="bytes, more than"):
        decode_item(item, WireLimits(max_bytes=len(item) - 1))
    with pytest.raises(RequestError, match="1 to 1 tensors"):
        decode_item(item, WireLimits(max_tensors=1))
    with pytest.raises(RequestError, match="more than 9 bytes"):
        decode_base64("A" * 100, WireLimits(max_bytes=9))


def test_base64_is_strict() -> None:
    text = pybase64.b64encode_as_string(encode_item(QWEN, QWEN_FIELDS))
    assert decode_base64(text, LIMITS).fields == QWEN_FIELDS
    for broken in (text[:-1], text + "=", text[:4] + "\n" + text[4:], "-" + text[1:], "é"):
        with pytest.raises(RequestError):
            decode_base64(broken, LIMITS)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)
    | st.binary(max_size=9) | st.builds(msgpack.ExtType, st.integers(0, 9), st.binary(max_size=9)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
near_items = st.dictionaries(
    st.text(max_size=5), st.fixed_dictionaries({"data": values, "field": values}) | values, max_size=3
)


# What the values of an item take as objects, whose number is bounded, beside the elements of its tensors.
OBJECT_BYTES = 512 * 1024


def read(data: bytes) -> None:
    with contextlib.suppress(RequestError):
        decode_item(data, LIMITS)


def read_within_the_limit(data: bytes, limits: WireLimits = LIMITS) -> None:
    """Reads or refuses, and allocates what the limit says at most."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with contextlib.suppress(RequestError):
        decode_item(data, limits)
    assert tracemalloc.get_traced_memory()[1] - before <= limits.max_bytes + OBJECT_BYTES


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    read(data)


@given(near_items)
def test_any_messagepack_is_read_or_refused(value: Any) -> None:
    read(msgpack.packb(value))


def damaged_item(place: int, byte: int, length: int) -> bytes:
    item = bytearray(encode_item(QWEN, QWEN_FIELDS))
    item[place % len(item)] = byte
    return bytes(item[: len(item) - length % len(item)])


damaged_items = st.builds(damaged_item, st.integers(0, 10**6), st.integers(0, 255), st.just(0) | st.integers(0, 10**6))


@given(damaged_items)
def test_a_damaged_item_is_read_or_refused(data: bytes) -> None:
    read(data)


FUZZED = WireLimits(max_bytes=1 << 17)


def large_item(dtype: str, parts: int, size: int, filler: bytes) -> bytes:
    """An item of tensors of many bytes in sum, or of very many small values."""
    itemsize = {"bfloat16": 2, "int64": 8}.get(dtype, 1)
    count = size // parts // itemsize
    tensor = [dtype, [count], msgpack.ExtType(3, bytes(count * itemsize))]
    item: bytes = msgpack.packb({f"t{part}": {"data": tensor, "field": ["batched", {}]} for part in range(parts)})
    return item + filler if len(filler) % 2 else item


large_items = st.builds(
    large_item,
    st.sampled_from(["uint8", "bfloat16", "int64", "x"]),
    st.integers(1, 40),
    st.integers(0, FUZZED.max_bytes),
    st.binary(max_size=3),
)
fillings = st.builds(
    lambda head, filler, count: head + filler * (count // len(filler)),
    st.sampled_from([b"\xdd\0\x0f\xff\xff", b"\xdf\0\x0f\xff\xff", b"\xdc\x0f\xff", b"\x81\xa1x\xdd\0\x0f\xff\xff"]),
    st.sampled_from(
        [b"\x90", b"\x80", b"\xa1x", b"\xcd\xff\xff", b"\xdc\x0f\xff", b"\xa1x\x90", b"\xd9\x80" + b"x" * 128]
    ),
    st.integers(0, FUZZED.max_bytes - 200),
)
hostile = st.binary(max_size=400) | near_items.map(msgpack.packb) | damaged_items | large_items | fillings


@pytest.mark.fuzz
@pytest.mark.usefixtures("traced")
@settings(max_examples=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile)
def test_twenty_thousand_cases_are_read_or_refused_without_an_allocation_beyond_the_limit(data: bytes) -> None:
    read_within_the_limit(data, FUZZED)


ITEMSIZES = {"int64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "bool": 1}
CLAIMS = {
    "an array of four thousand million": b"\xdd\xff\xff\xff\xff",
    "a map of four thousand million": b"\xdf\xff\xff\xff\xff",
    "a text of four gigabytes": b"\xdb\xff\xff\xff\xff",
    "bytes of four gigabytes": b"\xc6\xff\xff\xff\xff",
    "a tensor of four gigabytes": b"\xc9\xff\xff\xff\xff\x03",
    "a shape of exabytes": packed("float64", [2**31, 2**31], b""),
    "a shape of nothing by exabytes": packed("float64", [0, 2**62, 2**62], b""),
    "a shape of nothing by many sizes": packed("float64", [0] + [2**19] * 7, b""),
    "arrays in arrays": b"\xdc\x0f\xff" * 30,
    "a million empty arrays": b"\xdd\x00\x0f\xff\x00" + b"\x90" * 0xFFF00,
    "arrays of empty maps": b"\xdc\x0f\xff" + (b"\xdc\x0f\xff" + b"\x80" * 4095) * 200,
    "tensors of a limit each": msgpack.packb(
        {
            f"t{number}": {
                "data": ["bfloat16", [150_000], msgpack.ExtType(3, bytes(300_000))],
                "field": ["batched", {}],
            }
            for number in range(3)
        }
    ),
}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("claim", CLAIMS)
def test_what_an_item_claims_is_not_allocated(claim: str) -> None:
    read_within_the_limit(CLAIMS[claim] + b"\x00" * 64)
    read_within_the_limit(CLAIMS[claim])


@pytest.mark.usefixtures("traced")
def test_tensors_are_views_of_what_was_decoded_and_bfloat16_is_widened_in_one_step() -> None:
    elements = 200_000
    plain, half = packed("uint8", [elements], bytes(elements)), packed("bfloat16", [elements], bytes(2 * elements))
    for data, allocated in ((plain, 0), (half, 4 * elements)):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        item = decode_item(data, LIMITS)
        assert tracemalloc.get_traced_memory()[1] - before <= allocated + 100_000
        assert item.tensors["x"].shape == (elements,)


@pytest.mark.parametrize("dtype", ["int64", "float32", "float16", "bfloat16", "uint8", "bool"])
def test_a_tensor_is_aligned_and_read_only_wherever_its_elements_stand(dtype: str) -> None:
    for padding in range(9):
        field = ("flat", {"slices": ["x" * padding]})
        item = {"pad": {"data": ["uint8", [0], msgpack.ExtType(3, b"")], "field": field}}
        tensor = {
            "x": {"data": [dtype, [2], msgpack.ExtType(3, b"\1" * 2 * ITEMSIZES[dtype])], "field": ["batched", {}]}
        }
        read_back = decode_item(msgpack.packb(item | tensor), LIMITS).tensors["x"]
        assert np.asarray(read_back).flags.aligned
        assert not np.asarray(read_back).flags.writeable

"""Base64 of parts."""

import base64

from hypothesis import given
from hypothesis import strategies as st

from renderer.base64_parts import base64_parts


@given(st.lists(st.binary(max_size=9)))
def test_parts_of_any_length_give_the_base64_of_the_whole(parts: list[bytes]) -> None:
    assert b"".join(base64_parts(parts)) == base64.b64encode(b"".join(parts))


def test_views_are_parts_too() -> None:
    data = bytes(range(256)) * 40
    views = [memoryview(data)[:5], memoryview(data)[5:9000], memoryview(data)[9000:]]
    assert b"".join(base64_parts(views)) == base64.b64encode(data)

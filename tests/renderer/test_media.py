"""An image part is bytes, a name, or both; a name is never taken for content."""

import base64

import pytest

from renderer.conversation import ImagePart
from renderer.errors import MediaError, RequestError, UnsupportedFieldError
from renderer.media import bytes_of, check_uuid, data_url_bytes, identify
from renderer.prompt import ImageSize
from tests.renderer.builders import LIMITS, photo

DATA = b"\x89PNG\xff\xfe"
BASE64 = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "head",
    ["data:image/png;base64,", "data:;base64,", "DATA:image/png;charset=x;BASE64,", "data:anything/at-all;base64,"],
)
def test_a_data_url_is_read_whatever_its_type(head: str) -> None:
    assert data_url_bytes(head + BASE64) == DATA


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64", "has the form"),
        ("image/png;base64,AAAA", "has the form"),
        ("data:image/png,AAAA", "must be base64"),
        ("data:text/plain;base64x,AAAA", "must be base64"),
        ("data:;base64,A", "malformed"),
        ("data:;base64,AA=A", "malformed"),
        ("data:;base64,AA AA", "malformed"),
        ("data:;base64,_-__", "malformed"),
        ("data:;base64,é", "malformed"),
    ],
)
def test_a_malformed_data_url_is_the_callers_fault(url: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason) as caught:
        data_url_bytes(url, 3)
    assert caught.value.index == 3


def test_bytes_come_from_data_or_from_a_data_url_or_not_at_all() -> None:
    assert bytes_of(ImagePart(data=DATA), 0) == DATA
    assert bytes_of(ImagePart(url=f"data:;base64,{BASE64}"), 0) == DATA
    assert bytes_of(ImagePart(uuid="mine"), 0) is None


def test_a_part_with_nothing_in_it_is_refused() -> None:
    with pytest.raises(MediaError, match="neither data nor a uuid"):
        bytes_of(ImagePart(), 0)


def test_an_address_is_not_fetched_here() -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        bytes_of(ImagePart(url="https://example.org/a.png"), 0)
    assert caught.value.param == "image_url"


def test_an_identified_image_has_its_size_and_the_hash_of_its_content() -> None:
    item = identify(ImagePart(), 2, photo(), model="m", options={}, limits=LIMITS)
    assert (item.index, item.size, item.data) == (2, ImageSize(96, 64), photo())
    assert item.cache_key == f"content:{item.mm_hash}"


def test_a_uuid_is_shown_and_the_content_is_still_what_caches_know() -> None:
    plain = identify(ImagePart(), 0, photo(), model="m", options={}, limits=LIMITS)
    named = identify(ImagePart(uuid=plain.mm_hash), 0, photo(seed=1), model="m", options={}, limits=LIMITS)
    assert named.mm_hash == plain.mm_hash
    assert named.cache_key != plain.cache_key


def test_a_uuid_has_a_length_limit() -> None:
    check_uuid(None, 0, 3)
    check_uuid("", 0, 3)
    check_uuid("abc", 0, 3)
    with pytest.raises(RequestError) as caught:
        check_uuid("abcd", 0, 3)
    assert caught.value.param == "uuid"

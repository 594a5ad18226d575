"""Image parts to media items: bytes, what their header says, and what they are known by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pybase64

from renderer import hashing
from renderer.conversation import ImagePart
from renderer.errors import MediaError, RequestError, UnsupportedFieldError
from renderer.image import ImageHeader, ImageLimits, read_header
from renderer.prompt import ImageSize


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image of a request, identified and not decoded.

    Attributes:
        index: Its place among the request's images.
        data: The encoded file; None where the caller sent only a uuid.
        header: Of `data`.
        options: The processor options that it is processed under, those of its request.
        name: The key of the caller's uuid; None where there is none.
    """

    index: int
    data: bytes | None
    header: ImageHeader | None
    size: ImageSize
    mm_hash: str
    cache_key: str
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None


def data_url_bytes(url: str, index: int = 0) -> bytes:
    """The bytes of a `data:` URL, which must be base64.

    Raises:
        MediaError: It is no such URL.
    """
    head, comma, payload = url.partition(",")
    if head[:5].lower() != "data:" or not comma:
        raise MediaError("a data URL has the form data:<type>;base64,<data>", index)
    if head.rpartition(";")[2].strip().lower() != "base64":
        raise MediaError("a data URL must be base64", index)
    try:
        return pybase64.b64decode(payload, validate=True)
    except ValueError as error:
        raise MediaError(f"its base64 is malformed: {error}", index) from error


def bytes_of(part: ImagePart, index: int) -> bytes | None:
    """The encoded file of an image part; None where there is only a uuid.

    Raises:
        MediaError: The part names neither data nor a uuid, or its data URL is malformed.
        UnsupportedFieldError: It has an address and was not fetched: see `renderer.remote_media`.
    """
    if part.data is not None:
        return part.data
    if part.url is None:
        if part.uuid is None:
            raise MediaError("it has neither data nor a uuid", index)
        return None
    if part.url[:5].lower() != "data:":
        raise UnsupportedFieldError("an image's address has to be fetched before it is rendered", "image_url")
    return data_url_bytes(part.url, index)


def identify(
    part: ImagePart, index: int, data: bytes, *, model: str, options: Mapping[str, Any], limits: ImageLimits
) -> MediaItem:
    """Read the header of an image that came with its bytes, and hash it.

    The cache key is of the content even where the caller names it: a name shows in `mm_hash` and answers for nothing.
    """
    header = read_header(data, index, limits)
    digest = hashing.image_hash(model, data, header.converted, options)
    shown = digest if part.uuid is None else hashing.uuid_hash(model, part.uuid, options)
    return MediaItem(index, data, header, header.size, shown, hashing.content_key(digest), options)


def check_uuid(uuid: str | None, index: int, max_length: int) -> None:
    """Refuse a name that is too long.

    Raises:
        RequestError: It has more than `max_length` characters.
    """
    if uuid is not None and len(uuid) > max_length:
        raise RequestError(f"the uuid of image {index} has {len(uuid)} characters, more than {max_length}", "uuid")

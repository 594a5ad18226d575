"""Requests with addresses become requests with bytes, each image in its own place."""

from __future__ import annotations

from pathlib import Path

import pytest

from renderer.conversation import ChatRequest, CompletionRequest, ImagePart, Message, TextPart, TokensRequest
from renderer.errors import MediaForbiddenError, MediaUnreachableError
from renderer.fetch import MediaFetcher
from renderer.fetch_config import FetchConfig
from renderer.remote_media import remote_urls, with_media

DATA_URL = "data:;base64,AAAA"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.fixture
def fetcher(root: Path) -> MediaFetcher:
    return MediaFetcher(FetchConfig(file_root=root), 1000)


def request(*parts: ImagePart) -> ChatRequest:
    text = TextPart("look")
    return ChatRequest((Message("system", "be brief"), Message("user", (parts[0], text)), Message("user", parts[1:])))


async def test_every_image_gets_its_bytes_in_its_own_place(root: Path, fetcher: MediaFetcher) -> None:
    asked = request(
        ImagePart(url=f"file://{root}/a"),
        ImagePart(data=b"own"),
        ImagePart(url=DATA_URL),
        ImagePart(uuid="known"),
        ImagePart(url=f"FILE://{root}/b", uuid="name"),
    )
    assert sorted(remote_urls(asked)) == [0, 4]
    async with with_media(asked, fetcher) as filled:
        assert filled == request(
            ImagePart(data=b"a"),
            ImagePart(data=b"own"),
            ImagePart(url=DATA_URL),
            ImagePart(uuid="known"),
            ImagePart(data=b"b", uuid="name"),
        )
    tokens = TokensRequest((1, 2), (ImagePart(data=b"own"), ImagePart(url=f"file://{root}/b")))
    async with with_media(tokens, fetcher) as filled_tokens:
        assert filled_tokens == TokensRequest((1, 2), (ImagePart(data=b"own"), ImagePart(data=b"b")))


@pytest.mark.parametrize("asked", [CompletionRequest(("a",)), TokensRequest((1,)), request(ImagePart(url=DATA_URL))])
async def test_a_request_with_nothing_to_fetch_stays_as_it_is(
    asked: ChatRequest | CompletionRequest | TokensRequest, fetcher: MediaFetcher
) -> None:
    async with with_media(asked, fetcher) as filled:
        assert filled is asked


async def test_an_image_that_cannot_be_had_is_named_by_its_place_in_the_request(
    root: Path, fetcher: MediaFetcher
) -> None:
    for url, kind in (("file:///etc/passwd", MediaForbiddenError), (f"file://{root}/none", MediaUnreachableError)):
        with pytest.raises(kind) as refused:
            async with with_media(request(ImagePart(data=b"own"), ImagePart(url=url)), fetcher):
                pass
        assert refused.value.index == 1

"""Requests whose images are named by addresses become requests that hold their bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar, cast

from renderer.conversation import ChatRequest, CompletionRequest, ImagePart, Message, Part, TokensRequest, media_of
from renderer.fetch import MediaFetcher

Request = ChatRequest | CompletionRequest | TokensRequest
RequestT = TypeVar("RequestT", bound=Request)


@asynccontextmanager
async def with_media(request: RequestT, fetcher: MediaFetcher) -> AsyncIterator[RequestT]:
    """The request with the bytes of every image that it names by an `http(s):` or `file:` address.

    They count against what all requests may hold until the context is left. A `data:` address stays as it is.

    Raises:
        MediaError: An image cannot be had; names its place among the request's images.
        OverloadedError: Too much is being fetched, or held.
    """
    urls = remote_urls(request)
    if not urls:
        yield request
        return
    async with fetcher.fetched(urls) as data:
        yield cast(RequestT, _filled(request, data))


def remote_urls(request: Request) -> dict[int, str]:
    """The addresses that have to be fetched, by the image's place in the request."""
    return {index: part.url for index, part in enumerate(media_of(request)) if part.is_remote and part.url}


def _filled(request: Request, data: Mapping[int, bytes]) -> Request:
    numbers = iter(range(2**31))

    def filled(part: Part) -> Part:
        if not isinstance(part, ImagePart):
            return part
        own = data.get(next(numbers))
        return part if own is None else ImagePart(data=own, uuid=part.uuid)

    if isinstance(request, ChatRequest):
        return dataclasses.replace(request, messages=tuple(_refilled(each, filled) for each in request.messages))
    if isinstance(request, TokensRequest):
        media = tuple(part for part in map(filled, request.media) if isinstance(part, ImagePart))
        return dataclasses.replace(request, media=media)
    return request


def _refilled(message: Message, filled: Callable[[Part], Part]) -> Message:
    if not isinstance(message.content, tuple):
        return message
    return dataclasses.replace(message, content=tuple(map(filled, message.content)))

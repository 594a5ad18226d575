"""A call that is more than gRPC takes crosses all the same.

The handle is a stand-in: what Serve does with such calls is tested on a cluster (`stack/test_large_bodies.py`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from deployments.tier_handle import TierHandle


def refusal(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


class Handle:
    """By value it fails after so many items; by reference it answers."""

    def __init__(self, error: grpc.aio.AioRpcError, after: int = 0) -> None:
        self.error = error
        self.after = after
        self.ways: list[bool] = []

    def options(self, *, _by_reference: bool, stream: bool, **_: Any) -> Any:
        def remote(*arguments: Any) -> Any:
            self.ways.append(_by_reference)
            return Streamed(self, _by_reference) if stream else self.answer(_by_reference)

        return SimpleNamespace(remote=remote)

    async def answer(self, by_reference: bool) -> str:
        if not by_reference:
            raise self.error
        return "answer"


class Streamed:
    def __init__(self, handle: Handle, by_reference: bool) -> None:
        self._handle = handle
        self._by_reference = by_reference

    async def __aiter__(self) -> AsyncGenerator[int]:
        for number in range(3):
            if not self._by_reference and number == self._handle.after:
                raise self._handle.error
            yield number

    def cancel(self) -> None:
        pass


async def all_of(items: AsyncGenerator[int]) -> list[int]:
    return [item async for item in items]


async def caught(work: Awaitable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await work
    code: grpc.StatusCode = raised.value.code()
    return code


TOO_LARGE, OTHER = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL


async def test_what_is_too_large_by_value_crosses_by_reference() -> None:
    handle = Handle(refusal(TOO_LARGE))
    assert await TierHandle(handle).call("render", 1, by_reference=False) == "answer"
    assert await all_of(TierHandle(handle).stream("generate", 1, False)) == [0, 1, 2]
    assert handle.ways == [False, True, False, True]


async def test_no_other_failure_is_tried_again() -> None:
    handle = Handle(refusal(OTHER))
    assert await caught(TierHandle(handle).call("render", 1, by_reference=False)) is OTHER
    assert await caught(all_of(TierHandle(handle).stream("generate", 1, False))) is OTHER
    assert handle.ways == [False, False]


async def test_a_stream_that_has_begun_is_not_begun_again() -> None:
    handle = Handle(refusal(TOO_LARGE), after=1)
    assert await caught(all_of(TierHandle(handle).stream("generate", 1, False))) is TOO_LARGE
    assert handle.ways == [False]

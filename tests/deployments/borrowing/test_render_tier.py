"""How items cross to the render tier. The handle is a stand-in: what Serve does with a call is tested on a cluster."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.serve.context import _get_serve_request_context

from deployments.borrowing.render_tier import TENSORS_BY_VALUE_BYTES, RenderTier
from deployments.calls import BorrowCall
from deployments.tier_handle import BY_VALUE_BYTES
from renderer.caches import ProcessedItem
from renderer.media import MediaItem
from renderer.prompt import ImageSize

SMALL, LARGE = TENSORS_BY_VALUE_BYTES, TENSORS_BY_VALUE_BYTES + 1


class Handle:
    """Answers calls at once, with tensors of so many bytes, and keeps how they came."""

    def __init__(self, replicas: int, nbytes: int) -> None:
        router = SimpleNamespace(curr_replicas=dict.fromkeys(range(replicas)))
        self._router = SimpleNamespace(_asyncio_router=SimpleNamespace(request_router=router, _running_replicas=[]))
        self.nbytes = nbytes
        self.reports = 0
        self.by_reference: list[bool] = []
        self.calls: list[BorrowCall] = []
        self.requests: list[str] = []

    def options(self, *, method_name: str, _by_reference: bool = False, **_: Any) -> Any:
        method = self.report if method_name == "report" else self.process_item
        return SimpleNamespace(remote=lambda *arguments: method(_by_reference, *arguments))

    async def report(self, by_reference: bool) -> None:
        self.reports += 1

    def start(self, replicas: int) -> None:
        self._router._asyncio_router.request_router.curr_replicas = dict.fromkeys(range(replicas))

    async def process_item(self, by_reference: bool, call: BorrowCall) -> ProcessedItem:
        self.by_reference.append(by_reference)
        self.calls.append(call)
        self.requests.append(_get_serve_request_context()._internal_request_id)
        return ProcessedItem(call.item.size, {"pixels": np.zeros(1)}, self.nbytes)


def item(data: bytes = b"", width: int = 10, **options: Any) -> MediaItem:
    return MediaItem(0, data, None, ImageSize(width, 10), "hash", "key", options)


async def reached(handle: Handle, itself: bool = False) -> RenderTier:
    tier = RenderTier(lambda: handle, skip_mm_cache=True, itself=itself)
    assert tier.replicas() == 0, "nobody is asked before the ways are warm"
    await tier.warm()
    return tier


@pytest.mark.parametrize(("running", "itself", "others"), [(1, False, 1), (3, False, 3), (3, True, 2), (1, True, 0)])
async def test_replicas_are_those_that_can_be_asked(running: int, itself: bool, others: int) -> None:
    assert (await reached(Handle(running, 0), itself)).replicas() == others


async def test_a_tier_of_none_is_not_asked_until_it_has_a_replica() -> None:
    handle = Handle(0, 0)
    tier = RenderTier(lambda: handle, skip_mm_cache=True)
    warming = asyncio.create_task(tier.warm())
    for _ in range(10):
        await asyncio.sleep(0)
    assert (handle.reports, tier.replicas()) == (0, 0)
    handle.start(1)
    await warming
    assert (handle.reports, tier.replicas()) == (2, 1)


@pytest.mark.parametrize("itself", [False, True])
async def test_items_of_the_tiers_own_requests_are_called_counted(itself: bool) -> None:
    handle = Handle(2, SMALL)
    await (await reached(handle, itself)).process(item())
    assert [call.counted for call in handle.calls] == [itself]


@pytest.mark.parametrize(("nbytes", "later"), [(SMALL, False), (LARGE, True)])
async def test_tensors_cross_by_reference_unless_those_of_that_size_were_small(nbytes: int, later: bool) -> None:
    handle = Handle(1, nbytes)
    tier = await reached(handle)
    for each in (item(), item(), item(width=20), item(max_pixels=1)):
        await tier.process(each)
    assert handle.by_reference == [True, later, True, True]
    assert all(call.skip_mm_cache for call in handle.calls)


async def test_a_large_file_crosses_by_reference_whatever_comes_back() -> None:
    handle = Handle(1, SMALL)
    tier = await reached(handle)
    for each in (item(), item(bytes(BY_VALUE_BYTES)), item(bytes(BY_VALUE_BYTES + 1))):
        await tier.process(each)
    assert handle.by_reference == [True, False, True]


async def test_every_call_is_a_request_of_its_own_for_serve() -> None:
    handle = Handle(1, SMALL)
    tier = await reached(handle)
    await asyncio.gather(*(tier.process(item()) for _ in range(3)))
    assert len(set(handle.requests)) == 3
    assert _get_serve_request_context()._internal_request_id == ""

"""What an ingress replica does before anybody can reach it."""

from __future__ import annotations

import pytest

from deployments.answers.pieces import ArrayPieces
from deployments.calls import RenderCall, Reply
from deployments.config import GreenroomConfig
from deployments.metrics import metrics, silence
from deployments.operations import Operations
from deployments.records import Record
from deployments.rehearsal import rehearse, rehearse_rendering
from deployments.rendering import RenderOnly
from renderer.caches import CacheStats
from renderer.renderer import Renderer

CONFIG = GreenroomConfig.model_validate({"model": "demo/model", "engine": None})


async def test_every_image_is_rendered_and_nothing_is_counted(operations: Operations, renderer: Renderer) -> None:
    renderer.clear_mm_cache()
    await rehearse(operations)
    cache = renderer.readonly_mm_processor.cache
    assert cache is not None
    assert cache.stats.misses == 3
    report = operations.record.report()
    assert (report.requests, report.first_request_at) == ({}, None)
    assert report.warmup_s["rehearsal"] > 0


async def test_a_replica_behind_a_router_writes_its_answers_and_keeps_nothing(renderer: Renderer) -> None:
    written: list[bool] = []

    class Watched(RenderOnly):
        async def render_answer(self, call: RenderCall) -> Reply[ArrayPieces]:
            reply = await super().render_answer(call)
            written.append(self.caches["processor"].misses > 0)
            return reply

    renderer.clear_mm_cache()
    replica = Watched(renderer, Record("render"))
    await rehearse_rendering(replica)
    assert written == [False, True, True, True, True, True]
    assert replica.caches["processor"] == CacheStats()
    report = replica.record.report()
    assert (report.requests, report.first_request_at) == ({}, None)
    assert report.warmup_s["rehearsal"] > 0


async def test_what_cannot_be_answered_is_logged(
    operations: Operations, renderer: Renderer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(renderer, "render_chat", fail)
    await rehearse(operations)
    assert "the rehearsal failed with status 500" in caplog.text


def test_instruments_count_nothing_while_they_are_silent() -> None:
    loud = metrics()
    with silence(), silence():
        metrics().requests.inc(tags={"tier": "render", "operation": "x", "status": "200"})
        assert metrics() is not loud
    assert metrics() is loud

"""Warm-up reaches both processors in every thread, and leaves no trace."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from renderer.caches import CacheStats, Lease, ProcessedItem, ProcessorCache, SenderCache
from renderer.config import RendererConfig
from renderer.errors import WarmupError
from renderer.prompt import Tensors
from renderer.renderer import Renderer
from renderer.warmup import _clear_processor_cache
from tests.checkpoints import checkpoint
from tests.renderer.builders import DEMO, chat, demo_renderer, image_part
from tests.renderer.test_processor import Watched

STEPS = ["chat template", "mm_processor", "readonly_mm_processor"]


class WatchedCache(ProcessorCache):
    """A processor cache that remembers what it once held."""

    def __init__(self) -> None:
        super().__init__(10**9)
        self.stored: list[str] = []
        self.asked_by: set[str] = set()
        self.cleared = 0

    def look_up(self, key: str, lease: Lease | None = None) -> ProcessedItem | None:
        self.asked_by.add(threading.current_thread().name)
        return super().look_up(key, lease)

    def store(self, key: str, item: ProcessedItem) -> None:
        super().store(key, item)
        self.stored.append(key)

    def clear_cache(self) -> None:
        super().clear_cache()
        self.cleared += 1


class Failing(Watched):
    """A family that fails on every picture after the first `good` ones."""

    def __init__(self, family: Any, good: int) -> None:
        super().__init__(family)
        self._good = good

    def tensors(self, pixels: Any) -> Tensors:
        if sum(self.processed.values()) >= self._good:
            raise RuntimeError("no such kernel")
        return super().tensors(pixels)


@pytest.fixture
def cold() -> Iterator[Renderer]:
    """A renderer beside an engine whose two processors have caches that are watched."""
    renderer = demo_renderer(SenderCache(10**8), media_threads=3, render_threads=2)
    renderer.readonly_mm_processor.cache = WatchedCache()
    yield renderer
    renderer.close()


def watched(renderer: Renderer) -> WatchedCache:
    cache = renderer.readonly_mm_processor.cache
    assert isinstance(cache, WatchedCache)
    return cache


def test_readonly_processor_apply_called_and_cache_cleared(cold: Renderer) -> None:
    cold.warmup()
    assert watched(cold).stored
    assert watched(cold).cleared == 1
    assert watched(cold).stats == CacheStats()


def test_engine_path_processor_apply_called_and_cache_cleared(cold: Renderer) -> None:
    cold.mm_processor.cache = cache = WatchedCache()
    cold.warmup()
    assert cache.stored
    assert cache.cleared == 1
    assert cache.stats == CacheStats()


def test_the_sender_cache_is_left_without_entry_pin_or_statistic(cold: Renderer) -> None:
    cold.warmup()
    assert cold.mm_processor.cache is not None
    assert cold.mm_processor.cache.stats == CacheStats()


@pytest.mark.parametrize("good", [0, 4])
def test_caches_are_cleared_also_when_apply_raised(cold: Renderer, good: int) -> None:
    cold.mm_processor.cache = engine_path = WatchedCache()
    cold.config = cold.config.model_copy(update={"warmup": "lenient"})
    for seed, cache in enumerate((engine_path, watched(cold))):
        cache.store(f"left over {seed}", ProcessedItem(None, {}, 1))
    cold.family = Failing(cold.family, good)
    report = cold.warmup()
    assert list(report.failures) == ["mm_processor", "readonly_mm_processor"]
    assert engine_path.cleared == watched(cold).cleared == 1
    assert engine_path.stats == watched(cold).stats == CacheStats()


def test_a_processor_without_cache_is_warmed_and_has_nothing_to_clear() -> None:
    renderer = demo_renderer(None, processor_cache_bytes=0)
    renderer.family = family = Watched(renderer.family)
    assert list(renderer.warmup().steps) == STEPS
    assert family.processed
    renderer.close()


def test_nothing_to_clear_is_no_error() -> None:
    _clear_processor_cache(None)


def test_every_media_thread_processes_and_every_request_thread_applies(cold: Renderer) -> None:
    cold.family = family = Watched(cold.family)
    cold.warmup()
    assert len(family.threads) == 3
    assert all(name.startswith("media") for name in family.threads)
    assert len(watched(cold).asked_by) == 2
    assert all(name.startswith("render") for name in watched(cold).asked_by)


def test_the_largest_size_and_a_usual_one_are_processed(cold: Renderer) -> None:
    cold.family = family = Watched(cold.family)
    cold.warmup()
    sizes = {len(pixels) // 3 for pixels in family.processed}
    assert 640 * 480 in sizes
    assert 448 * 448 in sizes


def test_log_lines_are_the_origins(cold: Renderer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "greenroom.renderer"):
        cold.warmup()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert re.fullmatch(r"Multi-modal warmup completed in \d+\.\d{3}s", lines[0])
    assert re.fullmatch(r"Readonly multi-modal warmup completed in \d+\.\d{3}s", lines[1])


def test_a_failed_step_is_logged_with_its_traceback(cold: Renderer, caplog: pytest.LogCaptureFixture) -> None:
    cold.family = Failing(cold.family, 0)
    with pytest.raises(WarmupError, match="mm_processor: RuntimeError: no such kernel"):
        cold.warmup()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warnings] == [
        "Warm-up step 'mm_processor' failed",
        "Warm-up step 'readonly_mm_processor' failed",
    ]
    assert all(record.exc_info for record in warnings)


def test_lenient_goes_on_and_says_what_failed(cold: Renderer) -> None:
    cold.config = cold.config.model_copy(update={"warmup": "lenient"})
    cold.family = Failing(cold.family, 0)
    report = cold.warmup()
    assert report.failures["mm_processor"] == "RuntimeError: no such kernel"
    assert list(report.steps) == STEPS


def test_the_report_says_how_long_each_step_took_and_when_all_ended(cold: Renderer) -> None:
    before = time.time()
    report = cold.warmup()
    assert list(report.steps) == STEPS
    assert all(seconds > 0 for seconds in report.steps.values())
    assert before <= report.ended_at <= time.time()
    assert report.failures == {}


def test_a_model_without_media_warms_its_template_alone() -> None:
    renderer = Renderer(RendererConfig(model=str(checkpoint("qwen2"))))
    assert list(renderer.warmup().steps) == ["chat template"]
    renderer.close()


def test_a_modality_with_a_limit_of_0_is_not_warmed() -> None:
    renderer = demo_renderer(limit_mm_per_prompt={"image": 0})
    assert list(renderer.warmup().steps) == ["chat template"]
    renderer.close()


def test_a_render_after_warm_up_is_what_it_was_before(cold: Renderer) -> None:
    before = cold.render_chat(chat(image_part(), "What?"), skip_mm_cache=True)
    cold.warmup()
    assert cold.render_chat(chat(image_part(), "What?"), skip_mm_cache=True).layout() == before.layout()


FIRST_REQUEST = """
import sys
from tests.renderer.builders import chat, demo_renderer, encoded, picture
from renderer.conversation import ImagePart
renderer = demo_renderer()
renderer.warmup()
pictures = [encoded(picture(), form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
before = set(sys.modules)
renderer.render_chat(chat(*(ImagePart(data=data) for data in pictures), "What?"))
print(sorted(set(sys.modules) - before))
renderer.close()
"""


def test_the_first_request_after_warm_up_imports_nothing() -> None:
    run = subprocess.run([sys.executable, "-c", FIRST_REQUEST], cwd=DEMO.parents[1], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr

"""Which cache a request changes and which it does not, over HTTP and over a handle, on the replicas' own figures.

If the readonly path touched the sender cache, or the engine path went round it, answers would still be right: these
tests are where it shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest

from renderer.caches import CacheStats
from renderer.prompt import RenderedPrompt
from tests.stack.helpers import ITEM_BYTES, TOKENS, Application, about, picture

EMPTY = CacheStats()
Way = Literal["http", "handle"]
PATHS = {
    "chat_completions": "/v1/chat/completions",
    "completions": "/v1/completions",
    "render_chat": "/v1/chat/completions/render",
    "render_completion": "/v1/completions/render",
    "tokenize": "/tokenize",
}
both_ways = pytest.mark.parametrize("way", ["http", "handle"])
Ask = Callable[[Application, Way, str, Mapping[str, Any]], Any]


@pytest.fixture
def app(whole: Application) -> Application:
    whole.clear()
    return whole


@pytest.fixture
def beside(alone: Application) -> Application:
    """An application whose engine replica serves render-only requests too: both caches in one process."""
    alone.clear()
    return alone


def ask(app: Application, way: Way, operation: str, body: Mapping[str, Any]) -> None:
    if way == "handle":
        app.call(operation, body)
    else:
        response = app.post(PATHS[operation], body)
        assert response.status_code == 200, response.text


@both_ways
def test_openai_chat_keeps_mm_cache_for_engine_execution(app: Application, way: Way) -> None:
    for _ in range(2):
        ask(app, way, "chat_completions", {"messages": about(picture(0)), "max_tokens": 1})
    assert app.cache("engine", "sender") == CacheStats(entries=1, bytes=ITEM_BYTES, hits=1, misses=1)
    assert app.cache("engine", "processor") == EMPTY
    assert app.cache("render", "processor") == EMPTY


@both_ways
def test_openai_completion_keeps_mm_cache_for_engine_execution(app: Application, way: Way) -> None:
    ask(app, way, "chat_completions", {"messages": about(picture(0)), "max_tokens": 1})
    before = app.cache("engine", "sender"), app.report("engine").requests["generate"]
    ask(app, way, "completions", {"prompt": "Hello", "max_tokens": 1})
    assert (app.cache("engine", "sender"), app.report("engine").requests["generate"]) == (before[0], before[1] + 1)
    assert app.cache("engine", "processor") == EMPTY
    assert app.cache("render", "processor") == EMPTY


@both_ways
def test_renderer_only_chat_request_skips_mm_cache(app: Application, way: Way) -> None:
    ask(app, way, "chat_completions", {"messages": about(picture(0)), "max_tokens": 1})
    before = app.cache("engine", "sender")
    for _ in range(2):
        ask(app, way, "render_chat", {"messages": about(picture(0))})
    assert app.cache("engine", "sender") == before
    assert app.cache("render", "processor") == CacheStats(entries=1, bytes=ITEM_BYTES, hits=1, misses=1)


@both_ways
def test_renderer_only_chat_request_skips_mm_cache_beside_an_engine(beside: Application, way: Way) -> None:
    ask(beside, way, "chat_completions", {"messages": about(picture(0)), "max_tokens": 1})
    before = beside.cache("engine", "sender")
    for number in (0, 1, 0):
        ask(beside, way, "render_chat", {"messages": about(picture(number))})
    assert beside.cache("engine", "sender") == before
    assert beside.cache("engine", "processor") == CacheStats(entries=2, bytes=2 * ITEM_BYTES, hits=1, misses=2)


@both_ways
def test_renderer_only_completion_request_skips_mm_cache(beside: Application, way: Way) -> None:
    ask(beside, way, "chat_completions", {"messages": about(picture(0)), "max_tokens": 1})
    before, generated = beside.cache("engine", "sender"), beside.report("engine").requests["generate"]
    ask(beside, way, "render_completion", {"prompt": ["Hello", "there"]})
    assert beside.cache("engine", "sender") == before
    assert beside.cache("engine", "processor") == EMPTY
    assert beside.report("engine").requests["generate"] == generated


@both_ways
def test_tokenize_chat_skips_mm_cache_for_renderer_only_path(beside: Application, way: Way) -> None:
    ask(beside, way, "chat_completions", {"messages": about(picture(0)), "max_tokens": 1})
    before = beside.cache("engine", "sender")
    for number in (0, 1):
        ask(beside, way, "tokenize", {"messages": about(picture(number))})
    assert beside.cache("engine", "sender") == before
    assert beside.cache("engine", "processor") == EMPTY, "tokens need no pixel, so nothing was processed"


@both_ways
def test_tokenize_completion_skips_mm_cache_for_renderer_only_path(beside: Application, way: Way) -> None:
    ask(beside, way, "chat_completions", {"messages": about(picture(0)), "max_tokens": 1})
    before = beside.cache("engine", "sender")
    ask(beside, way, "tokenize", {"prompt": "Hello there"})
    assert beside.cache("engine", "sender") == before
    assert beside.cache("engine", "processor") == EMPTY


@both_ways
def test_a_known_image_sends_no_tensor_to_the_engine(app: Application, way: Way) -> None:
    before = engine_counters(app)
    for _ in range(3):
        ask(app, way, "chat_completions", {"messages": about(picture(0), picture(1)), "max_tokens": 1})
    tensors, nbytes = engine_counters(app)
    assert (tensors - before[0], nbytes - before[1]) == (2, 2 * ITEM_BYTES)
    assert app.cache("engine", "sender").hits == 4


def test_a_layout_request_processes_nothing(app: Application) -> None:
    response = app.post("/v1/chat/completions/render", {"messages": about(picture(0)), "mm_payload": "none"})
    features = response.json()["features"]
    assert features["kwargs_data"] is None
    assert features["mm_placeholders"]["image"][0]["length"] == TOKENS
    assert app.cache("render", "processor") == EMPTY


def test_http_and_handle_render_the_same(app: Application) -> None:
    body = {"messages": about(picture(0), picture(1))}
    over_http = app.post("/v1/chat/completions/render", body).json()
    prompt: RenderedPrompt = app.call("render_chat", body)
    assert over_http["token_ids"] == list(prompt.token_ids)
    assert over_http["features"]["mm_hashes"]["image"] == [item.mm_hash for item in prompt.items]
    places = [{"offset": item.range.offset, "length": item.range.length} for item in prompt.items]
    assert over_http["features"]["mm_placeholders"]["image"] == places
    assert len(over_http["features"]["kwargs_data"]["image"]) == 2


def test_tensors_arrive_over_a_handle_as_read_only_arrays(app: Application) -> None:
    prompt: RenderedPrompt = app.call("render_chat", {"messages": about(picture(0))})
    pixels = (prompt.items[0].tensors or {})["pixel_values"]
    assert (pixels.dtype.name, pixels.nbytes, pixels.flags.writeable) == ("uint8", ITEM_BYTES - 24, False)


def test_a_layout_over_a_handle_has_the_tokens_of_the_whole(app: Application) -> None:
    body = {"messages": about(picture(0))}
    assert app.call("layout", body) == app.call("render_chat", body).layout()


def engine_counters(app: Application) -> tuple[int, int]:
    stats = app.report("engine").engine
    assert stats is not None
    return stats.tensors_received, stats.tensor_bytes_received


def test_health_over_http_is_the_handles_health(app: Application) -> None:
    body = app.http.get("/health").json()
    assert body["status"] == "ok"
    tiers = app.tiers()
    assert {tier: [entry["replica"] for entry in entries] for tier, entries in body["tiers"].items()} == {
        tier: [report.replica for report in reports] for tier, reports in tiers.items()
    }
    assert json.dumps(body)

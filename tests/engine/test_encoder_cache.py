"""Bounded in bytes; the least recently used goes first."""

import torch

from engine.encoder_cache import EncoderCache

ROW = 4  # bytes


def embeds(rows: int) -> torch.Tensor:
    return torch.zeros(rows, 1)


def test_the_least_recently_used_goes_first() -> None:
    cache = EncoderCache(3 * ROW)
    for key in "abc":
        cache.put(key, embeds(1))
    assert cache.get("a") is not None
    cache.put("d", embeds(1))
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]
    assert (len(cache), cache.bytes) == (3, 3 * ROW)


def test_what_is_larger_than_the_cache_passes_and_evicts_nothing() -> None:
    cache = EncoderCache(2 * ROW)
    cache.put("a", embeds(2))
    cache.put("large", embeds(3))
    assert cache.get("large") is None
    assert cache.get("a") is not None


def test_a_second_output_of_the_same_item_counts_once() -> None:
    cache = EncoderCache(2 * ROW)
    cache.put("a", embeds(1))
    cache.put("a", embeds(1))
    assert cache.bytes == ROW


def test_a_cache_of_nothing_holds_nothing() -> None:
    cache = EncoderCache(0)
    cache.put("a", embeds(1))
    assert len(cache) == 0


def test_clearing_forgets_everything() -> None:
    cache = EncoderCache(2 * ROW)
    cache.put("a", embeds(1))
    cache.clear()
    assert (cache.get("a"), cache.bytes) == (None, 0)

"""The embedded engine against `model.generate`, one request after another, on the same model in one run.

    python -m bench.engine                the demo model's bigger sibling, float32, on the CPU
    python -m bench.engine --size 3b      a 3B-class Qwen2.5-VL, bfloat16, on a GPU, beside its memory-bandwidth bound

Weights are random and built here; prompts are noise: 64 tokens of text and one picture of 64 tokens. The second turn of
a conversation about four pictures is measured with those and, on a GPU, with such as 1280x720 becomes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from engine.config import EngineConfig
from engine.embedded import EmbeddedEngine
from engine.families.base import PixelFormat, normalise
from engine.protocol import SamplingParams
from renderer.prompt import PlaceholderRange, PromptItem, RenderedPrompt

IMAGE = 766
PICTURE = (8, 8)  # tokens, high and wide
LARGE = (26, 46)  # of 1280x720
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FORM = PixelFormat(1 / 255, MEAN, STD)
ROUNDS = 5


@dataclass(frozen=True)
class Size:
    """A Qwen2.5-VL and the load that is put on it."""

    text: dict[str, Any]
    vision: dict[str, Any]
    concurrency: tuple[int, ...]
    tokens: int
    kv_cache_bytes: int
    pictures: tuple[tuple[int, int], ...]  # of the second turn's conversations, in tokens


SIZES = {
    "sibling": Size(
        {
            "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
            "intermediate_size": 2048, "vocab_size": 4096, "rope_parameters": {"mrope_section": [8, 12, 12]},
        },
        {"hidden_size": 128, "depth": 4, "num_heads": 4, "intermediate_size": 256, "fullatt_block_indexes": [1, 3]},
        (1, 8, 16), 128, 256 << 20, (PICTURE,),
    ),
    "3b": Size(
        {
            "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "intermediate_size": 11008, "vocab_size": 151936, "rope_parameters": {"mrope_section": [16, 24, 24]},
        },
        {"hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": 3420},
        (1, 8, 32), 128, 8 << 30, (PICTURE, LARGE),
    ),
}  # fmt: skip


def build(size: Size, folder: Path, device: str, dtype: torch.dtype) -> None:
    """Write a checkpoint of random weights, scaled so that its greedy output varies."""
    text = size.text | {"tie_word_embeddings": True, "max_position_embeddings": 8192}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6} | text["rope_parameters"]
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=size.vision | {"out_hidden_size": text["hidden_size"]},
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": MEAN, "image_std": STD}
    edges = {"shortest_edge": 16 * 28 * 28, "longest_edge": 1024 * 28 * 28}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"size": edges}))


def prompt(seed: int, pictures: int = 1, grid: tuple[int, int] = PICTURE) -> RenderedPrompt:
    noise = np.random.default_rng(seed)
    ids: list[int] = []
    items = []
    high, wide = grid
    for index in range(pictures):
        ids += [int(token) for token in noise.integers(0, IMAGE, 32)]
        tensors: dict[str, NDArray[Any]] = {
            "pixel_values": noise.integers(0, 256, (2 * high * 2 * wide, 1176), dtype=np.uint8),
            "image_grid_thw": np.array([1, 2 * high, 2 * wide], dtype=np.int64),
        }
        key = f"{seed}/{index}/{high}x{wide}"
        items.append(PromptItem(key, key, PlaceholderRange(len(ids), high * wide), tensors))
        ids += [IMAGE] * (high * wide)
    ids += [int(token) for token in noise.integers(0, IMAGE, 32)]
    return RenderedPrompt(tuple(ids), tuple(items))


class Load:
    """Sends prompts that the engine has not seen before."""

    def __init__(self, engine: EmbeddedEngine, tokens: int) -> None:
        self._engine = engine
        self._params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self._seeds = iter(range(10**9))

    async def first_token_s(self, request: RenderedPrompt) -> float:
        begun, first = time.perf_counter(), 0.0
        async for _ in self._engine.generate(request, self._params, request_id="bench"):
            first = first or time.perf_counter() - begun
        return first

    async def run(self, concurrency: int, requests: int) -> tuple[float, float]:
        """Tokens a second, and the median time to the first token in seconds."""
        turns = asyncio.Semaphore(concurrency)

        async def one(request: RenderedPrompt) -> float:
            async with turns:
                return await self.first_token_s(request)

        prompts = [prompt(next(self._seeds)) for _ in range(requests)]
        begun = time.perf_counter()
        firsts = await asyncio.gather(*map(one, prompts))
        return requests * self._params.max_tokens / (time.perf_counter() - begun), statistics.median(firsts)


class Sequential:
    """`model.generate`, one request after another."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, tokens: int) -> None:
        self._device = device
        self._tokens = tokens
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
        self._model.generation_config = GenerationConfig()

    def tokens_per_s(self, requests: int) -> float:
        begun = time.perf_counter()
        for seed in range(requests):
            self._generate(prompt(seed))
        return requests * self._tokens / (time.perf_counter() - begun)

    def _generate(self, request: RenderedPrompt) -> None:
        tensors = request.items[0].tensors or {}
        pixels = torch.from_numpy(tensors["pixel_values"]).view(-1, 3, 392)
        ids = torch.tensor([request.token_ids], device=self._device)
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == IMAGE).int(),
            pixel_values=normalise(pixels, FORM, channel_axis=1).flatten(1).to(self._device),
            image_grid_thw=torch.from_numpy(tensors["image_grid_thw"])[None].to(self._device),
            generation_config=GenerationConfig(
                max_new_tokens=self._tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            ),
        )


def bandwidth_bound(folder: Path, size: Size, concurrency: int) -> float:
    """Tokens a second if each step only read the weights and the sequences' keys and values, at the speed of a copy."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    speed = 10 * 2 * source.nbytes / (time.perf_counter() - begun)
    vision = 670e6 * 2  # the vision encoder takes no part in decoding
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) - vision
    context = len(prompt(0).token_ids) + size.tokens / 2
    head: int = size.text["hidden_size"] // size.text["num_attention_heads"]
    keys_values: float = 2 * size.text["num_hidden_layers"] * size.text["num_key_value_heads"] * head * 2 * context
    return concurrency * speed / (weights + concurrency * keys_values)


def report(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


async def bench(size: Size, folder: Path, device: str, dtype: torch.dtype) -> None:
    most = max(size.concurrency)
    config = EngineConfig(
        model=str(folder), device=device, max_num_seqs=most, kv_cache_bytes=size.kv_cache_bytes, max_model_len=8192
    )
    engine = EmbeddedEngine(config)
    begun = time.perf_counter()
    await engine.start()
    report(start_s=round(time.perf_counter() - begun, 2), warmup_s=(await engine.stats()).warmup_s)
    load, alone = Load(engine, size.tokens), Sequential(folder, device, dtype, size.tokens)
    rates, firsts, sequential = await rounds(size, load, alone)
    for grid in size.pictures:
        await second_turn(engine, load, grid)
    await engine.close()
    report(sequential_generate_tokens_per_s=round(sequential, 1))
    for concurrency, rate in rates.items():
        bound: dict[str, object] = {}
        if device == "cuda":
            bound = {"of_bandwidth_bound": round(rate / bandwidth_bound(folder, size, concurrency), 3)}
        report(
            engine=concurrency,
            tokens_per_s=round(rate, 1),
            first_token_ms=round(firsts[concurrency] * 1e3, 1),
            times_sequential=round(rate / sequential, 2),
            **bound,
        )


async def rounds(size: Size, load: Load, alone: Sequential) -> tuple[dict[int, float], dict[int, float], float]:
    """Best of several rounds that take turns: other load on the machine then hits all alike.

    Returns:
        Tokens a second, and seconds to the first token, by concurrency; tokens a second of sequential generation.
    """
    rates: dict[int, list[float]] = {concurrency: [] for concurrency in size.concurrency}
    firsts: dict[int, list[float]] = {concurrency: [] for concurrency in size.concurrency}
    sequential = []
    await load.run(2, 2)
    alone.tokens_per_s(1)
    for _ in range(ROUNDS):
        sequential.append(alone.tokens_per_s(2))
        for concurrency in size.concurrency:
            rate, first = await load.run(concurrency, max(2, concurrency))
            rates[concurrency].append(rate)
            firsts[concurrency].append(first)
    best = {concurrency: max(values) for concurrency, values in rates.items()}
    return best, {concurrency: min(values) for concurrency, values in firsts.items()}, max(sequential)


async def second_turn(engine: EmbeddedEngine, load: Load, grid: tuple[int, int]) -> None:
    """A conversation about four pictures: what its second turn costs beside the first."""
    firsts, seconds, sent = [], [], []
    for seed in range(1 << 20, (1 << 20) + ROUNDS):
        first = prompt(seed, 4, grid)
        before = (await engine.stats()).tensor_bytes_received
        first_s = await load.first_token_s(first)
        middle = (await engine.stats()).tensor_bytes_received
        again = RenderedPrompt((*first.token_ids, *range(40)), tuple(by_reference(first.items)))
        second_s = await load.first_token_s(again)
        after = (await engine.stats()).tensor_bytes_received
        firsts.append(first_s)
        seconds.append(second_s)
        sent.append((after - middle) / (middle - before))
    first_s, second_s = statistics.median(firsts), statistics.median(seconds)
    report(
        tokens_of_four_pictures=4 * grid[0] * grid[1],
        first_turn_ms=round(first_s * 1e3, 1),
        second_turn_ms=round(second_s * 1e3, 1),
        ratio=round(second_s / first_s, 3),
        tensor_bytes_ratio=max(sent),
    )


def by_reference(items: Sequence[PromptItem]) -> Sequence[PromptItem]:
    return [PromptItem(item.mm_hash, item.cache_key, item.range, None) for item in items]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sibling")
    parser.add_argument("--folder", type=Path, help="Where the checkpoint is kept; a temporary folder by default.")
    options = parser.parse_args()
    size = SIZES[options.size]
    device = "cuda" if options.size == "3b" else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "config.json").exists():
            build(size, folder, device, dtype)
        report(model=options.size, device=device, threads=1, cores=os.cpu_count())
        asyncio.run(bench(size, folder, device, dtype))


if __name__ == "__main__":
    main()

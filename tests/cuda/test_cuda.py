"""The embedded engine on a GPU: steps as graphs, variable-length vision attention, half precision.

Run by `make test-cuda`.

In float32 tokens are those of `model.generate` on the same GPU. In bfloat16 the order in which a batch is summed up is
enough to turn a near tie, so there every token is one that plain transformers holds for as good as its likeliest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.embedded import EmbeddedEngine
from engine.graphs import StepGraphs
from engine.warmup import warm_up
from engine.worker import Worker
from renderer.prompt import RenderedPrompt
from tests.checkpoints import checkpoint
from tests.engine.builders import GREEDY, Lab, Picture, Rig, Text, engine_config

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(600)]

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "idefics3", "smolvlm", "qwen2", "qwen3", "llama")
TILED = ("llava", "idefics3", "smolvlm")
TEXT = ("qwen2", "qwen3", "llama")
# Of the largest logit: bfloat16 has 8 bits, and layers add up.
NEAR_TIE = 0.02


@functools.cache
def gpu_lab(family: str, dtype: torch.dtype) -> Lab:
    return Lab(checkpoint(family), "cuda", dtype)


def worker_of(family: str, dtype: str) -> Worker:
    """Warmed up, which captures its graphs."""
    room = {"max_model_len": 4096} if family in TILED else {}
    worker = Worker(engine_config(checkpoint(family), device="cuda", dtype=dtype, kv_cache_bytes=1 << 26, **room))
    warm_up(worker)
    return worker


def batch(family: str, lab: Lab) -> list[RenderedPrompt]:
    """Text, one picture, two pictures, the same one again, odd sizes."""
    texts = [lab.prompt(Text(5 * seed + 2, seed)) for seed in range(4)]
    if family in TEXT:
        return texts * 4
    first, second, wide = Picture(1), Picture(2, 84, 56), Picture(3, 168, 40)
    return [
        *texts,
        lab.prompt(Text(3, 2), first, Text(7, 3)),
        lab.prompt(Text(3, 2), second, Text(7, 3)),
        lab.prompt(first, Text(2, 4), second, Text(9, 5)),
        lab.prompt(Text(11, 7), wide),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_in_float32_answers_as_each_request_alone(family: str) -> None:
    lab = gpu_lab(family, torch.float32)
    prompts = batch(family, lab)
    answers = Rig(worker_of(family, "float32")).answers(*prompts)
    assert answers == [lab.alone(prompt, GREEDY.max_tokens) for prompt in prompts]
    assert len(set(answers)) >= 4  # a model that says the same to everything proves nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_in_bfloat16_answers_what_is_as_good_as_likeliest(family: str) -> None:
    lab = gpu_lab(family, torch.bfloat16)
    prompts = batch(family, lab)
    for prompt, answer in zip(prompts, Rig(worker_of(family, "bfloat16")).answers(*prompts), strict=True):
        scores = lab.scores(prompt, answer)
        chosen = scores[range(len(answer)), list(answer)]
        assert bool((chosen >= scores.max(dim=-1).values - NEAR_TIE * scores.abs().max()).all()), answer


def test_decode_steps_of_any_number_of_requests_run_as_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of("qwen2_5_vl", "float32")
    ran = tokens_of_steps(monkeypatch)
    rig, lab = Rig(worker), gpu_lab("qwen2_5_vl", torch.float32)
    prompts = [lab.prompt(Text(count + 2, count)) for count in range(16)]
    for count in (1, 3, 16):
        answers = rig.answers(*prompts[:count])
        assert answers == [lab.alone(prompt, GREEDY.max_tokens) for prompt in prompts[:count]]
        assert ran[-(GREEDY.max_tokens - 1) :] == [count] * (GREEDY.max_tokens - 1)
        ran.clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_about_what_the_prefix_cache_holds_runs_as_one_graph(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = gpu_lab(family, torch.float32)
    rig = Rig(worker_of(family, "float32"))
    ran = tokens_of_steps(monkeypatch)
    for length, prompt in zip((1, 14, 40, 75), batch(family, lab)[-4:], strict=True):
        first = longer(prompt, 24)  # so that the last whole block that is kept ends behind its pictures
        rig.answers(first)
        second = longer(first, length)
        ran.clear()
        assert rig.answers(second) == [lab.alone(second, GREEDY.max_tokens)]
        assert ran[0] >= length
        assert ran[1:] == [1] * (GREEDY.max_tokens - 1)


def tokens_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each step from now on that runs as a graph; 0 where there is none that is large enough."""
    ran: list[int] = []
    run = StepGraphs.run

    def counted(graphs: StepGraphs, ids: NDArray[np.int64], *inputs: NDArray[np.int64]) -> torch.Tensor | None:
        logits = run(graphs, ids, *inputs)
        ran.append(len(ids) if logits is not None else 0)
        return logits

    monkeypatch.setattr(StepGraphs, "run", counted)
    return ran


def longer(prompt: RenderedPrompt, tokens: int) -> RenderedPrompt:
    return dataclasses.replace(prompt, token_ids=(*prompt.token_ids, *range(20, 20 + tokens)))


async def test_the_engine_answers_many_at_once_and_the_second_time_from_its_caches() -> None:
    lab = gpu_lab("qwen2_5_vl", torch.float32)
    pictures = [lab.prompt(Text(20, seed), Picture(seed), Text(4)) for seed in range(8)]
    prompts = [*pictures, *(lab.prompt(Text(9, seed)) for seed in range(8))]
    alone = [lab.alone(prompt, GREEDY.max_tokens) for prompt in prompts]
    config = engine_config(lab.path, device="cuda", dtype="float32", kv_cache_bytes=1 << 26)
    engine = EmbeddedEngine(config)
    try:
        await engine.start()
        assert await asyncio.gather(*(ask(engine, prompt, number) for number, prompt in enumerate(prompts))) == alone
        before = await engine.stats()
        assert await asyncio.gather(*(ask(engine, known(prompt), number) for number, prompt in enumerate(pictures)))
        after = await engine.stats()
        assert after.encoder_runs == before.encoder_runs
        assert after.tensors_received == before.tensors_received
    finally:
        await engine.close()


def known(prompt: RenderedPrompt) -> RenderedPrompt:
    """Without the tensors, which the engine holds."""
    return dataclasses.replace(prompt, items=tuple(dataclasses.replace(item, tensors=None) for item in prompt.items))


async def ask(engine: EmbeddedEngine, prompt: RenderedPrompt, number: int) -> tuple[int, ...]:
    outputs = engine.generate(prompt, GREEDY, request_id=f"r{number}")
    return tuple([token async for output in outputs for token in output.token_ids])

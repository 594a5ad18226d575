"""Greedy tokens equal those of `model.generate` for each request alone, whatever else is in the batch.

Wrong positions, a mask that lets one sequence see another, or embeddings in the wrong rows change no shape and raise
nothing: the model just answers something else.
"""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.families import FAMILIES
from engine.graphs import StepInputs
from engine.model import Model
from engine.worker import Worker
from renderer.errors import ConfigError
from renderer.prompt import RenderedPrompt
from tests.checkpoints import checkpoint
from tests.engine.builders import GREEDY, Lab, Picture, Rig, Text, engine_config, lab

IMAGE_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "idefics3", "smolvlm")
TEXT_FAMILIES = ("llama", "qwen2", "qwen3")
TILED = ("llava", "idefics3", "smolvlm")
LONG = 4096


def worker_of(family: str, **changes: object) -> Worker:
    room = {"max_model_len": LONG, "kv_cache_bytes": 1 << 25} if family in TILED else {}
    return Worker(engine_config(checkpoint(family), **(room | changes)))


def mixed_batch(lab: Lab) -> list[RenderedPrompt]:
    """Text, one image, two images, repeats, odd sizes, images first and last."""
    first, second, wide = Picture(1), Picture(2, 84, 56), Picture(3, 168, 40)
    return [
        lab.prompt(Text(5)),
        lab.prompt(Text(40, 1)),
        lab.prompt(Text(3, 2), first, Text(7, 3)),
        lab.prompt(Text(3, 2), second, Text(7, 3)),
        lab.prompt(first, Text(2, 4), second, Text(9, 5)),
        lab.prompt(second, second, Text(1, 6)),
        lab.prompt(Text(11, 7), wide),
        lab.prompt(Text(5)),
    ]


def text_batch(lab: Lab) -> list[RenderedPrompt]:
    return [lab.prompt(Text(7 * count + 1, count)) for count in range(8)]


@pytest.mark.parametrize("family", [*IMAGE_FAMILIES, *TEXT_FAMILIES])
def test_batches_of_every_size_answer_as_each_request_alone(family: str) -> None:
    """One request more joins at every step until there are sixteen; they leave in another order."""
    own = lab(family)
    prompts = mixed_batch(own) if own.has_images else text_batch(own)
    dice = random.Random(family)
    asked = [dataclasses.replace(prompt, cache_salt=str(turn)) for turn in range(2) for prompt in prompts]
    dice.shuffle(asked)
    counts = dice.sample(range(17, 33), len(asked))
    rig = Rig(worker_of(family, max_num_batched_tokens=2048))
    sizes: set[int] = set()
    keys: list[int] = []
    while len(keys) < len(asked) or rig.worker.scheduler.has_work:
        if len(keys) < len(asked):
            keys.append(rig.submit(asked[len(keys)], dataclasses.replace(GREEDY, max_tokens=counts[len(keys)])))
        rig.step()
        sizes.add(len(rig.worker.scheduler.running))
    assert sizes >= set(range(1, 17))
    answers = [tuple(rig.tokens[key]) for key in keys]
    assert answers == [own.alone(prompt, 32)[:count] for prompt, count in zip(asked, counts, strict=True)]
    assert len({answer[:10] for answer in answers}) >= 7  # a model that says the same to everything proves nothing


@pytest.mark.parametrize("family", [*IMAGE_FAMILIES, *TEXT_FAMILIES])
def test_prompts_in_small_chunks_answer_as_each_request_alone(family: str) -> None:
    own = lab(family)
    prompts = mixed_batch(own)[: 5 if family in TILED else None] if own.has_images else text_batch(own)
    rig = Rig(worker_of(family, max_num_batched_tokens=48))
    assert rig.answers(*prompts) == [own.alone(prompt, 32)[: GREEDY.max_tokens] for prompt in prompts]


def test_requests_that_join_and_leave_between_steps_answer_as_alone() -> None:
    prompts = mixed_batch(lab("qwen2_5_vl"))
    rig = Rig(worker_of("qwen2_5_vl", max_num_batched_tokens=32))
    lengths = [3 + 2 * index for index in range(len(prompts))]
    keys = []
    for prompt, length in zip(prompts, lengths, strict=True):
        keys.append(rig.submit(prompt, dataclasses.replace(GREEDY, max_tokens=length)))
        rig.step()
    rig.run()
    alone = [lab("qwen2_5_vl").alone(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    assert [tuple(rig.tokens[key]) for key in keys] == alone


def test_raw_pixels_answer_as_normalised_ones() -> None:
    prompt = lab("qwen2_5_vl").prompt(Text(3), Picture(1), Text(4))
    raw = as_raw(prompt)
    rig = Rig(worker_of("qwen2_5_vl"))
    (answer,) = rig.answers(raw)
    assert answer == lab("qwen2_5_vl").alone(prompt, GREEDY.max_tokens)


def as_raw(prompt: RenderedPrompt) -> RenderedPrompt:
    """Undo rescaling and normalising, as far as whole numbers go, which is what the pixels were."""
    processor = lab("qwen2_5_vl").processor
    items = []
    for item in prompt.items:
        assert item.tensors is not None
        pixels = item.tensors["pixel_values"]
        by_channel = pixels.reshape(len(pixels), 3, -1)
        mean, std = (np.array(values)[:, None] for values in (processor.image_mean, processor.image_std))
        raw = np.rint((by_channel * std + mean) / processor.rescale_factor).astype(np.uint8)
        tensors = dict(item.tensors) | {"pixel_values": raw.reshape(pixels.shape)}
        items.append(dataclasses.replace(item, tensors=tensors))
    return dataclasses.replace(prompt, items=tuple(items))


class Eager:
    """In the place of graphs, which need CUDA: the same step, computed at once, rows without tokens and all."""

    def __init__(self, step: Callable[[StepInputs], torch.Tensor]) -> None:
        self._step = step
        self.ran: list[int] = []

    def run(self, ids: NDArray[np.int64], *inputs: NDArray[np.int64]) -> torch.Tensor:
        self.ran.append(len(ids))
        return self._step(StepInputs(*(torch.from_numpy(each.copy()) for each in (ids, *inputs))))


@pytest.mark.parametrize("family", [*IMAGE_FAMILIES, *TEXT_FAMILIES])
def test_a_short_piece_of_text_answers_the_same_as_a_step_of_a_graph(family: str) -> None:
    own = lab(family)
    prompts = (mixed_batch(own) if own.has_images else text_batch(own))[:4]
    rig = Rig(worker_of(family))
    graphs = Eager(rig.worker.model._step)
    rig.worker.model._graphs = graphs  # type: ignore[assignment]
    for prompt in prompts:
        rig.answers(prompt)
        second = dataclasses.replace(prompt, token_ids=(*prompt.token_ids, *range(30, 54)))
        graphs.ran.clear()
        assert rig.answers(second) == [own.alone(second, GREEDY.max_tokens)]
        assert 24 <= graphs.ran[0] <= len(second.token_ids)


@pytest.mark.parametrize("family", ["gemma3", "internvl", "mistral3", "paligemma", "llava_next"])
def test_an_unknown_family_is_refused_by_name(family: str) -> None:
    with pytest.raises(ConfigError, match=family) as refusal:
        Model(engine_config(checkpoint(family)))
    assert all(name in str(refusal.value) for name in FAMILIES)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 64, "use_sliding_window": True}, "sliding"),
        ({"rope_parameters": LONG_ROPE}, "longrope"),
    ],
)
def test_a_decoder_that_would_be_run_wrongly_is_refused(
    changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("qwen2"), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=reason):
        Model(engine_config(folder))


def test_a_missing_checkpoint_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="/nowhere"):
        Model(EngineConfig(model="/nowhere"))


def test_a_block_pool_without_room_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        Model(engine_config(checkpoint("qwen2"), kv_cache_bytes=10))

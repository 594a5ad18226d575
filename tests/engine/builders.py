"""Prompts built by hand from a checkpoint's image processor, and what `model.generate` answers to each one alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
)

from engine.config import EngineConfig
from engine.messages import Submit
from engine.protocol import EngineOutput, SamplingParams
from engine.worker import Worker
from renderer.caches import SenderCache, Submission, SubmittedItem
from renderer.errors import GreenroomError
from renderer.prompt import ImageSize, PlaceholderRange, PromptItem, RenderedPrompt, Tensors
from tests.checkpoints import checkpoint

torch.set_num_threads(1)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
# Another value than its own default for every parameter.
EVERY_PARAMETER = SamplingParams(
    max_tokens=4,
    temperature=0.7,
    top_p=0.9,
    top_k=7,
    min_p=0.05,
    presence_penalty=0.3,
    frequency_penalty=0.4,
    repetition_penalty=1.2,
    seed=5,
    stop_token_ids=(3, 4),
    ignore_eos=True,
    min_tokens=2,
    logprobs=1,
    structured={"type": "object"},
)
_MARK = 19
NO_IDS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Text:
    """So many tokens, the same ones for the same seed."""

    tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Picture:
    """Blocks of random colours."""

    seed: int
    width: int = 56
    height: int = 56

    @property
    def key(self) -> str:
        return f"picture-{self.seed}-{self.width}x{self.height}"

    def draw(self) -> Image.Image:
        colours = np.random.default_rng(self.seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(colours).resize((self.width, self.height), Image.Resampling.NEAREST)


Part = Text | Picture


class Lab:
    """One checkpoint: prompts for it and the answers of plain transformers."""

    def __init__(self, path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.path = path
        self.device = device
        self.dtype = dtype
        self.config = AutoConfig.from_pretrained(path)
        self.has_images = hasattr(self.config, "vision_config")
        self._alone: dict[tuple[Any, ...], tuple[int, ...]] = {}

    @functools.cached_property
    def processor(self) -> Any:
        """At sizes that keep the tests fast."""
        options: dict[str, Any] = {}
        if self.config.model_type.startswith("qwen"):
            options = {"min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28}
        if self.config.model_type in ("idefics3", "smolvlm"):
            options = {"size": {"longest_edge": 2 * self.config.vision_config.image_size}}
        return AutoImageProcessor.from_pretrained(self.path, **options)

    @functools.cached_property
    def model(self) -> Any:
        auto = AutoModelForImageTextToText if self.has_images else AutoModelForCausalLM
        model = auto.from_pretrained(self.path, dtype=self.dtype).to(self.device).eval()
        model.generation_config = GenerationConfig()  # generate() falls back on the checkpoint's penalties and ends
        return model

    def prompt(self, *parts: Part, salt: str | None = None) -> RenderedPrompt:
        """All tensors included."""
        ids: list[int] = []
        items: list[PromptItem] = []
        for part in parts:
            if isinstance(part, Text):
                ids += self._text(part)
                continue
            tensors, tokens, mask = self._picture(part)
            place = PlaceholderRange(len(ids), len(tokens), mask)
            items.append(PromptItem(part.key, part.key, place, tensors, ImageSize(part.width, part.height)))
            # generate() takes adjacent images for one, and fails: every family puts a mark between them.
            ids += [*tokens, _MARK]
        return RenderedPrompt(tuple(ids), tuple(items), salt)

    def alone(self, prompt: RenderedPrompt, count: int) -> tuple[int, ...]:
        """Greedy tokens of `model.generate` for this request alone."""
        known = (prompt.token_ids, tuple(item.cache_key for item in prompt.items), count)
        if known not in self._alone:
            ids = torch.tensor([prompt.token_ids], device=self.device)
            settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                **self._model_inputs(prompt, ids),
            )
            self._alone[known] = tuple(output[0, ids.shape[1] :].tolist())
        return self._alone[known]

    @torch.inference_mode()
    def scores(self, prompt: RenderedPrompt, output: Sequence[int]) -> torch.Tensor:
        """float32 [tokens, vocabulary]: plain transformers' logits for each token of an output."""
        ids = torch.tensor([[*prompt.token_ids, *output[:-1]]], device=self.device)
        inputs = self._model_inputs(prompt, ids)
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False, **inputs).logits[0, -len(output) :]
        return logits.float()

    def _text(self, part: Text) -> list[int]:
        low, high = 20, min(250, self.config.get_text_config().vocab_size)
        return [int(token) for token in np.random.default_rng(part.seed).integers(low, high, part.tokens)]

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def _picture(self, part: Picture) -> tuple[Tensors, list[int], tuple[bool, ...] | None]:
        """Tensors, placeholder tokens, and which of them carry embeddings."""
        output = self.processor(images=[part.draw()], return_tensors="pt")
        tensors = {name: value[0].numpy() for name, value in output.items() if torch.is_tensor(value)}
        image = self.config.image_token_id if hasattr(self.config, "image_token_id") else self.config.image_token_index
        if "image_grid_thw" in tensors:
            merge = self.config.vision_config.spatial_merge_size
            tensors["pixel_values"] = output["pixel_values"].numpy()
            return tensors, [image] * int(tensors["image_grid_thw"].prod() // merge**2), None
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        if "pixel_attention_mask" not in tensors:
            return tensors, [image] * patches, None
        per_tile = patches // self.config.scale_factor**2
        tokens = [_MARK, *[image] * per_tile, _MARK] * len(tensors["pixel_values"])
        return tensors, tokens, tuple(token == image for token in tokens)

    def _model_inputs(self, prompt: RenderedPrompt, ids: torch.Tensor) -> dict[str, Any]:
        if not prompt.items:
            return {}
        tensors = [_torch(item.tensors or {}, self.device) for item in prompt.items]
        pixels = [item["pixel_values"] for item in tensors]
        if "image_grid_thw" in tensors[0]:
            kinds = (ids == self.config.image_token_id).int()
            grids = torch.stack([item["image_grid_thw"] for item in tensors])
            return {"pixel_values": torch.cat(pixels), "image_grid_thw": grids, "mm_token_type_ids": kinds}
        if "pixel_attention_mask" in tensors[0]:
            masks = torch.cat([item["pixel_attention_mask"] for item in tensors])
            return {"pixel_values": torch.cat(pixels)[None], "pixel_attention_mask": masks[None]}
        return {"pixel_values": torch.stack(pixels)}


@functools.cache
def lab(family: str) -> Lab:
    return Lab(checkpoint(family))


def engine_config(path: Path, **changes: Any) -> EngineConfig:
    """Small: 400 blocks of 8 tokens are plenty for the tests' requests."""
    small: dict[str, Any] = {
        "model": str(path),
        "block_size": 8,
        "kv_cache_bytes": 401 * 8 * 2 * 2 * 1 * 32 * 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "max_model_len": 1024,
    }
    return EngineConfig.model_validate(small | changes)


def with_other_weights(path: Path, folder: Path) -> Path:
    """A checkpoint of the same architecture, its weights in another order, written to `folder`."""
    shutil.copytree(path, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[torch.randperm(len(parameter), generator=generator)])
    model.save_pretrained(folder)
    return folder


def lend(prompt: RenderedPrompt, cache: SenderCache) -> RenderedPrompt:
    """What a renderer beside an engine makes of it: items looked up under a lease, without tensors where held."""
    lease = cache.lease()
    held = [cache.look_up(item.cache_key, lease) is not None for item in prompt.items]
    items = tuple(
        dataclasses.replace(item, tensors=None) if known else item
        for item, known in zip(prompt.items, held, strict=True)
    )
    return dataclasses.replace(prompt, items=items, lease=lease)


class Rig:
    """A worker without its process: requests go in, steps are taken one at a time, outputs are collected."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, EngineOutput] = {}
        self.outputs: dict[int, list[EngineOutput]] = {}
        self.failures: dict[int, GreenroomError] = {}
        self._keys = itertools.count()

    def submit(
        self, prompt: RenderedPrompt, params: SamplingParams = GREEDY, prior: Sequence[int] = (), keep: bool = False
    ) -> int:
        """Send with all tensors."""
        items = tuple(SubmittedItem(item.cache_key, item.tensors, keep) for item in prompt.items)
        key = next(self._keys)
        self.tokens[key], self.outputs[key] = [], []
        self.worker.handle(
            Submit(
                key,
                as_ids(prompt.token_ids),
                tuple(item.range for item in prompt.items),
                Submission((), items),
                params,
                as_ids(prior),
                prompt.cache_salt,
            )
        )
        self.collect()
        return key

    def step(self) -> None:
        self.worker.step()
        self.collect()

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.worker.scheduler.has_work:
            self.step()

    def answers(self, *prompts: RenderedPrompt, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
        """All at once."""
        keys = [self.submit(prompt, params) for prompt in prompts]
        self.run()
        return [tuple(self.tokens[key]) for key in keys]

    def collect(self) -> None:
        news = self.worker.drain()
        if news is None:
            return
        self.failures.update(news.failures)
        for key, output in news.outputs:
            self.tokens[key] += output.token_ids
            self.outputs[key].append(output)
            if output.finish_reason is not None:
                self.ends[key] = output


def as_ids(tokens: Sequence[int]) -> NDArray[np.int32]:
    return np.array(tokens, dtype=np.int32)


def _torch(tensors: Tensors, device: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value).to(device) for name, value in tensors.items()}

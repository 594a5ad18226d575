"""The model: a Hugging Face checkpoint, run over packed tokens and paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText

from engine.attention import PAGED, KVPool, PagedBatch, Prefill
from engine.config import EngineConfig
from engine.families import PixelFormat, find_family
from engine.scheduler import Chunk
from renderer.errors import ConfigError
from renderer.prompt import PlaceholderRange, Tensors


class Model:
    """Weights, block memory, and the two forward passes: `encode` for images, `forward` for tokens."""

    def __init__(self, config: EngineConfig) -> None:
        self.device = torch.device(_pick_device(config.device))
        hf_config = _load_config(config)
        self.family = find_family(hf_config)
        self.dtype = _pick_dtype(config.dtype, self.device)
        self.hf = _load_weights(config, hf_config, self.dtype).to(self.device).eval()
        text = hf_config.get_text_config()
        _check_attention(text)
        self._decoder = self.hf.get_decoder()
        self._decoder.config._attn_implementation = PAGED
        self._embed = self.hf.get_input_embeddings()
        self._head = self.hf.get_output_embeddings()
        self._pixels = None if self.family.item_of is None else _pixel_format(config)
        self.max_positions = int(text.max_position_embeddings)
        self.eos_ids = _eos_ids(self.hf)
        self.vocab_size = int(self._head.weight.shape[0])
        self._block_size = config.block_size
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        block_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * config.block_size
        self.num_blocks = config.kv_cache_bytes // (block_bytes * self.dtype.itemsize) - 1
        if self.num_blocks < 1:
            raise ConfigError(f"kv_cache_bytes={config.kv_cache_bytes} does not hold a block of {block_bytes} elements")
        slots = (self.num_blocks + 1) * config.block_size
        self._pool = KVPool(text.num_hidden_layers, slots, text.num_key_value_heads, head_size, self.dtype, self.device)

    def positions(
        self, token_ids: NDArray[np.int32], items: Sequence[tuple[PlaceholderRange, Tensors]]
    ) -> tuple[NDArray[np.int64], int]:
        """Rotary positions of a prompt, int64 [rows, tokens], and what to add to the index of a later token."""
        return self.family.positions(self.hf, token_ids, items)

    def check_item(self, tensors: Tensors, range_: PlaceholderRange) -> None:
        """Raises RequestError for an item that could not be encoded, or would not fill its range."""
        self.family.check(self.hf, tensors, range_)

    @torch.inference_mode()
    def encode(self, items: Sequence[Tensors]) -> list[torch.Tensor]:
        """Embeddings [tokens, features] of each item, each with memory of its own."""
        assert_pixels = self._pixels or PixelFormat(1.0, (), ())
        return [embeds.clone() for embeds in self.family.encode(self.hf, assert_pixels, items)]

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute the chunks' tokens; return float32 logits [chunks that sample, vocabulary], in their order."""
        ids = np.concatenate([chunk.request.tokens[chunk.start : chunk.end] for chunk in chunks])
        positions = np.concatenate([chunk.request.positions_of(chunk.start, chunk.end) for chunk in chunks], axis=1)
        embeds = self._embed(self._tensor(ids.astype(np.int64)))
        self._scatter(embeds, chunks)
        place = self._tensor(positions)
        output = self._decoder(
            inputs_embeds=embeds[None],
            position_ids=place[:, None] if self.family.position_rows > 1 else place,
            past_key_values=None,
            use_cache=False,
            paged=self._batch(chunks),
        )
        ends = np.cumsum([chunk.end - chunk.start for chunk in chunks]) - 1
        rows = self._tensor(np.array([end for chunk, end in zip(chunks, ends, strict=True) if chunk.samples], np.int64))
        logits: torch.Tensor = self._head(output.last_hidden_state[0, rows])
        return logits.float()

    def _scatter(self, embeds: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """Put the items' embeddings where the chunks hold their placeholders."""
        row = 0
        for chunk in chunks:
            for item in chunk.items:
                start, end = max(chunk.start, item.range.offset), min(chunk.end, item.range.end)
                target = embeds[row + start - chunk.start : row + end - chunk.start]
                if item.embeds is None:
                    raise RuntimeError(f"item {item.cache_key} is not encoded")
                first, last = start - item.range.offset, end - item.range.offset
                if item.range.embed_mask is None:
                    target.copy_(item.embeds[first:last])
                    continue
                mask = np.array(item.range.embed_mask)
                before = int(mask[:first].sum())
                picked = self._tensor(np.flatnonzero(mask[first:last]))
                target[picked] = item.embeds[before : before + len(picked)].to(target.dtype)
            row += chunk.end - chunk.start

    def _batch(self, chunks: Sequence[Chunk]) -> PagedBatch:
        slots = np.concatenate([self._slots(chunk, chunk.start) for chunk in chunks])
        single = [chunk for chunk in chunks if chunk.end - chunk.start == 1]
        longest = max((chunk.end for chunk in single), default=0)
        contexts = np.zeros((len(single), longest), dtype=np.int64)
        mask = np.full((len(single), 1, 1, longest), -np.inf, dtype=np.float32)
        for index, chunk in enumerate(single):
            contexts[index, : chunk.end] = self._slots(chunk, 0)
            mask[index, :, :, : chunk.end] = 0
        prefills, row = [], len(single)
        for chunk in chunks[len(single) :]:
            prefills.append(self._prefill(chunk, row))
            row += chunk.end - chunk.start
        return PagedBatch(
            self._pool,
            self._tensor(slots),
            self._tensor(contexts),
            self._tensor(mask).to(self.dtype),
            tuple(prefills),
        )

    def _prefill(self, chunk: Chunk, row: int) -> Prefill:
        length = chunk.end - chunk.start
        mask = None
        if chunk.start:
            visible = torch.ones(length, chunk.end, dtype=torch.bool, device=self.device).tril(chunk.start)
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, -torch.inf)
        return Prefill(row, row + length, self._tensor(self._slots(chunk, 0)), mask)

    def _slots(self, chunk: Chunk, start: int) -> NDArray[np.int64]:
        """Slots of the tokens from `start` to the chunk's end."""
        index = np.arange(start, chunk.end, dtype=np.int64)
        return (
            chunk.request.block_table[index // self._block_size] * np.int64(self._block_size) + index % self._block_size
        )

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _pick_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{name} is not a dtype")
    return dtype


def _load_config(config: EngineConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(config.model, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration of {config.model}: {error}") from error


def _load_weights(config: EngineConfig, hf_config: Any, dtype: torch.dtype) -> Any:
    transformers.utils.logging.disable_progress_bar()
    auto = AutoModelForCausalLM if hf_config.get_text_config() is hf_config else AutoModelForImageTextToText
    try:
        return auto.from_pretrained(config.model, revision=config.revision, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the weights of {config.model}: {error}") from error


def _check_attention(text: Any) -> None:
    """Raises ConfigError where the decoder has layers that do not attend to the whole context."""
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(f"the transformers engine runs full attention alone, the checkpoint has {sorted(kinds)}")


def _pixel_format(config: EngineConfig) -> PixelFormat:
    processor = AutoImageProcessor.from_pretrained(config.model, revision=config.revision)
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return PixelFormat(scale, (0.0,) * 3, (1.0,) * 3)
    return PixelFormat(scale, tuple(processor.image_mean), tuple(processor.image_std))


def _eos_ids(model: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])

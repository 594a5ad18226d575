"""The model: a Hugging Face checkpoint, run over packed tokens and paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoImageProcessor

from engine.attention import PAGED, EqualChunks, KVPool, KVShape, PackedPrefills, PagedBatch, Prefill
from engine.blocks import NULL_BLOCK
from engine.config import EngineConfig
from engine.families import find_family
from engine.fusion import fuse_norms
from engine.graphs import StepGraphs, StepInputs
from engine.scheduler import Chunk
from engine.weights import load_weights, replace_weights
from renderer.errors import ConfigError
from renderer.prompt import Tensors


class Model:
    """Weights, block memory, and the two forward passes: `encode` for images, `forward` for tokens."""

    def __init__(self, config: EngineConfig) -> None:
        self.device = torch.device(_pick_device(config.device))
        self.dtype = _pick_dtype(config.dtype, self.device)
        hf_config = _load_config(config)
        family = find_family(hf_config)
        text = hf_config.get_text_config()
        _check_decoder(text)
        model = self._model = load_weights(config, family, self.dtype).to(self.device).eval()
        if self.device.type == "cuda":
            fuse_norms(model)
        self.family = family(model, _load_processor(config) if family.takes_images else None)
        self._decoder = model.get_decoder()
        self._decoder.config._attn_implementation = PAGED
        self._embed = model.get_input_embeddings()
        self._head = model.get_output_embeddings()
        self.max_positions = int(text.max_position_embeddings)
        self.eos_ids = _eos_ids(model)
        self.vocab_size = int(self._head.weight.shape[0])
        self._block_size = config.block_size
        shape = KVShape.of(text, self.dtype)
        self.num_blocks = config.kv_cache_bytes // (shape.token_bytes * config.block_size) - 1
        if self.num_blocks < 1:
            raise ConfigError(f"kv_cache_bytes={config.kv_cache_bytes} has no room for a block beside the empty one")
        self._packs = self.device.type == "cuda" and self.dtype.itemsize == 2
        self._graphs: StepGraphs | None = None
        self._pool = KVPool(shape, self.num_blocks + 1, config.block_size, self.device)

    def reload(self, path: str, revision: str | None = None) -> None:
        """Take the weights of another checkpoint of the same shape. Memory and captured graphs stay.

        Raises:
            RequestError: There is none at this path; nothing is changed.
        """
        replace_weights(self._model, path, type(self.family), revision)

    @torch.inference_mode()
    def encode(self, items: Sequence[Tensors]) -> list[torch.Tensor]:
        """Features [embeddings, features] of each item, each with memory of its own."""
        return [features.clone() for features in self.family.encode(items)]

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute the chunks' tokens; return float32 logits [chunks that sample, vocabulary], in their order."""
        ids = np.concatenate([chunk.request.tokens[chunk.start : chunk.end] for chunk in chunks]).astype(np.int64)
        positions = np.concatenate([chunk.request.positions_of(chunk.start, chunk.end) for chunk in chunks], axis=1)
        ends = np.cumsum([chunk.end - chunk.start for chunk in chunks]) - 1
        sampled = ends[[chunk.samples for chunk in chunks]]
        if self._graphs is not None and _fits_graphs(chunks):
            slots, seen = np.concatenate([self._slots(chunk, chunk.start) for chunk in chunks]), _seen(chunks)
            logits = self._graphs.run(ids, slots, seen, positions, self._tables(chunks))
            if logits is not None:
                return logits if len(ids) == len(chunks) else logits[self._tensor(sampled)]
        embeds = self._embed(self._tensor(ids))
        visual = self._place_items(embeds, chunks)
        hidden = self._decode(embeds, self._tensor(positions), self._batch(chunks), **visual)
        return self._logits(hidden[self._tensor(sampled)])

    @torch.inference_mode()
    def capture_graphs(self, max_seqs: int, max_tokens: int) -> None:
        """Make steps that decode up to so many sequences, and steps of a short piece of one's text, cheap to launch.

        On CUDA alone. `max_tokens` is the longest sequence.
        """
        if self.device.type == "cuda":
            rows, size = self.family.position_rows, self._block_size
            budget = 2 * self.num_blocks
            self._graphs = StepGraphs(self._step, rows, size, max_seqs, self._blocks(max_tokens), budget)

    def _step(self, inputs: StepInputs) -> torch.Tensor:
        """A step of which nothing leaves the device."""
        equal = EqualChunks.of(inputs.tables, inputs.seen, self._block_size, self.dtype)
        batch = PagedBatch(self._pool, inputs.slots, equal)
        return self._logits(self._decode(self._embed(inputs.ids), inputs.positions, batch))

    def _decode(self, embeds: torch.Tensor, positions: torch.Tensor, batch: PagedBatch, **visual: Any) -> torch.Tensor:
        """[tokens, hidden size] -> the same; positions int64 [rows, tokens]."""
        output = self._decoder(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None] if self.family.position_rows > 1 else positions,
            past_key_values=None,
            use_cache=False,
            paged=batch,
            **visual,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(hidden)
        return logits.float()

    def _place_items(self, embeds: torch.Tensor, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """Write items' embeddings over those of their placeholders; return what else the decoder needs of them."""
        rows: list[NDArray[np.int64]] = []
        features: list[torch.Tensor] = []
        first_row = 0
        for chunk in chunks:
            for item in chunk.items:
                tokens, picked = item.features(chunk.start, chunk.end)
                rows.append(tokens + (first_row - chunk.start))
                features.append(picked)
            first_row += chunk.end - chunk.start
        if not rows:
            return {}
        visual = torch.zeros(len(embeds), dtype=torch.bool)
        visual[torch.from_numpy(np.concatenate(rows))] = True
        visual = visual.to(self.device)
        joined = torch.cat(features)
        embeds[visual] = joined[:, : embeds.shape[1]].to(embeds.dtype)
        return self.family.decoder_inputs(visual[None], joined[:, embeds.shape[1] :])

    def _batch(self, chunks: Sequence[Chunk]) -> PagedBatch:
        slots = np.concatenate([self._slots(chunk, chunk.start) for chunk in chunks])
        single = [chunk for chunk in chunks if chunk.end - chunk.start == 1]
        several = chunks[len(single) :]
        packed = self._packed(several, len(single)) if several and self._packs else None
        prefills = () if packed is not None else self._prefills(several, len(single))
        return PagedBatch(self._pool, self._tensor(slots), self._equal(single) if single else None, prefills, packed)

    def _equal(self, single: Sequence[Chunk]) -> EqualChunks:
        tables, seen = self._tensor(self._tables(single)), self._tensor(_seen(single))
        return EqualChunks.of(tables, seen, self._block_size, self.dtype)

    def _tables(self, chunks: Sequence[Chunk]) -> NDArray[np.int64]:
        """Block tables up to the chunks' ends, padded with the null block."""
        counts = [self._blocks(chunk.end) for chunk in chunks]
        tables = np.full((len(chunks), max(counts, default=0)), NULL_BLOCK, dtype=np.int64)
        for table, chunk, count in zip(tables, chunks, counts, strict=True):
            table[:count] = chunk.request.block_table[:count]
        return tables

    def _prefills(self, chunks: Sequence[Chunk], row: int) -> tuple[Prefill, ...]:
        prefills = []
        for chunk in chunks:
            prefills.append(self._prefill(chunk, row))
            row += chunk.end - chunk.start
        return tuple(prefills)

    def _prefill(self, chunk: Chunk, row: int) -> Prefill:
        length = chunk.end - chunk.start
        mask = None
        if chunk.start:
            visible = torch.ones(length, chunk.end, dtype=torch.bool, device=self.device).tril(chunk.start)
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, -torch.inf)
        blocks = chunk.request.block_table[: self._blocks(chunk.end)].astype(np.int64)
        return Prefill(row, row + length, self._tensor(blocks), chunk.end, mask)

    def _packed(self, chunks: Sequence[Chunk], row: int) -> PackedPrefills:
        lengths, contexts = [chunk.end - chunk.start for chunk in chunks], [chunk.end for chunk in chunks]
        bounds, context_bounds = (
            self._tensor(np.cumsum([0, *counts], dtype=np.int32)) for counts in (lengths, contexts)
        )
        context = self._tensor(np.concatenate([self._slots(chunk, 0) for chunk in chunks]))
        return PackedPrefills(row, bounds, context_bounds, context, max(lengths), max(contexts))

    def _slots(self, chunk: Chunk, start: int) -> NDArray[np.int64]:
        """Where keys and values of the chunk's sequence lie, from a token on to the chunk's end."""
        index = np.arange(start, chunk.end, dtype=np.int64)
        blocks = chunk.request.block_table[index // self._block_size].astype(np.int64)
        return blocks * self._block_size + index % self._block_size

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _fits_graphs(chunks: Sequence[Chunk]) -> bool:
    """Whether all sequences decode, or there is one, with text alone."""
    return all(chunk.is_decoding for chunk in chunks) or (len(chunks) == 1 and not chunks[0].items)


def _seen(chunks: Sequence[Chunk]) -> NDArray[np.int64]:
    """How many tokens of its sequence each token of the chunks sees, itself included."""
    return np.concatenate([np.arange(chunk.start + 1, chunk.end + 1, dtype=np.int64) for chunk in chunks])


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


def _load_processor(config: EngineConfig) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(config.model, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the image processor of {config.model}: {error}") from error


def _check_decoder(text: Any) -> None:
    """
    Raises:
        ConfigError: Its layers do not attend to the whole context, or a token's rotary position depends on how long the
            other sequences of a step are.
    """
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(f"the transformers engine runs full attention alone, the checkpoint has {sorted(kinds)}")
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type")
    if rope == "longrope":
        raise ConfigError("the transformers engine does not run rope_type 'longrope', which looks at a whole batch")


def _eos_ids(model: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])

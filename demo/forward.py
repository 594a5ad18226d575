"""A batched forward pass over the parameters of the Hugging Face model, for training.

Transformers runs the windows of each picture one by one unless flash attention is installed. Here pictures
of one size are stacked, windows are a mask, and the residual stream stays float32 under autocast.
`tests/demo/test_forward.py` holds it against the model's own forward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from demo.batches import Batch
from demo.checkpoint import IMAGE_MEAN, IMAGE_STD

PROBED_LAYER = 2  # text layers below the place where positions are read off, in training


def run(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Image features, hidden states and probed image tokens of a batch."""
    seen = [
        see(model.model.visual, patches, rows, columns)
        for patches, (rows, columns) in zip(batch.patches, batch.grids, strict=True)
        if len(patches)
    ]
    width = model.config.text_config.hidden_size
    features = torch.cat(seen) if seen else torch.zeros(0, width, device=batch.tokens.device)
    hidden, probed = read(model, batch.tokens, batch.positions, features, batch.places)
    return features, hidden, probed


def see(visual: Any, patches: Tensor, rows: int, columns: int) -> Tensor:
    """Image features (pictures * rows * columns, hidden) of equally large pictures.

    `patches`: uint8 (pictures, 4 * rows * columns, 588), 2x2 blocks together, channel-y-x inside a patch;
    `rows` and `columns` count image tokens.
    """
    count, length, _ = patches.shape
    hidden = _embed_patches(visual.patch_embed.proj.weight, patches)
    cosine, sine = _grid_rotation(visual, rows, columns, patches.device)
    windows = _same_window(rows, columns, patches.device)
    for index, block in enumerate(visual.blocks):
        mask = None if index in visual.fullatt_block_indexes else windows
        heads = block.attn.num_heads
        query, key, value = block.attn.qkv(_norm(block.norm1, hidden)).view(count, length, 3, heads, -1).unbind(2)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        mixed = _attend(query, key, value, mask=mask)
        hidden = hidden + block.attn.proj(mixed.flatten(2))
        hidden = hidden + block.mlp(_norm(block.norm2, hidden))
    merged = _norm(visual.merger.ln_q, hidden).view(count * rows * columns, -1)
    features: Tensor = visual.merger.mlp(merged)
    return features.float()


def read(model: Any, tokens: Tensor, positions: Tensor, features: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (batch * length, hidden) after the last norm, and the image tokens' after `PROBED_LAYER`.

    `tokens` (batch, length), padded on the right; `positions` (3, batch, length); `places`: where in the
    flat batch each row of `features` belongs.
    """
    text = model.model.language_model
    batch, length = tokens.shape
    hidden = _embed_tokens(text.embed_tokens.weight, tokens.flatten())
    hidden = hidden.index_copy(0, places, features).view(batch, length, -1)
    probed = hidden
    cosine, sine = _text_rotation(model.config.text_config, positions)
    for index, layer in enumerate(text.layers):
        attention = layer.self_attn
        before = _norm(layer.input_layernorm, hidden)
        query, key, value = (
            project(before).view(batch, length, -1, attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        groups = query.shape[2] // key.shape[2]
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
        hidden = hidden + attention.o_proj(_attend(query, key, value, causal=True).flatten(2))
        hidden = hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))
        if index + 1 == PROBED_LAYER:
            probed = hidden
    final = _norm(text.norm, hidden).flatten(0, 1)
    return final, probed.flatten(0, 1).index_select(0, places)


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


def _embed_patches(weight: Tensor, patches: Tensor) -> Tensor:
    """A still picture fills both temporal slices, so their weights add up."""
    mean = torch.tensor(IMAGE_MEAN, device=patches.device).repeat_interleave(196)
    deviation = torch.tensor(IMAGE_STD, device=patches.device).repeat_interleave(196)
    pixels = (patches.float() / 255 - mean) / deviation
    return functional.linear(pixels, weight.sum(2).flatten(1)).float()


def _embed_tokens(weight: Tensor, tokens: Tensor) -> Tensor:
    """A matrix product: the gradient of a lookup is slow where thousands of ids are equal."""
    one_hot = tokens[:, None] == torch.arange(weight.shape[0], device=tokens.device)
    return torch.matmul(one_hot.to(weight.dtype), weight).float()


def _block_coordinates(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, in the order of the patches."""
    grid = torch.arange(4 * rows * columns, device=device).view(rows, columns, 2, 2)
    row, column = torch.meshgrid(
        torch.arange(2 * rows, device=device), torch.arange(2 * columns, device=device), indexing="ij"
    )

    def in_blocks(values: Tensor) -> Tensor:
        return values.view(rows, 2, columns, 2).transpose(1, 2).reshape(grid.numel())

    return in_blocks(row), in_blocks(column)


def _grid_rotation(visual: Any, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    row, column = _block_coordinates(rows, columns, device)
    attention = visual.blocks[0].attn
    quarter = attention.head_dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, device=device) / quarter)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency] * 2, dim=-1)
    return angle.cos()[None, :, None], angle.sin()[None, :, None]


def _same_window(rows: int, columns: int, device: torch.device) -> Tensor:
    """Boolean (patches, patches): whether two patches share a window of 8 x 8 patches."""
    row, column = _block_coordinates(rows, columns, device)
    window = (row // 8) * columns + column // 8
    return window[:, None] == window[None, :]


def _text_rotation(config: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (batch, length, 1, head size); time, row and column own a section of the frequencies each."""
    half = config.hidden_size // config.num_attention_heads // 2
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half, device=positions.device) / half)
    sections = torch.tensor(config.rope_parameters["mrope_section"], device=positions.device)
    axis = torch.repeat_interleave(torch.arange(3, device=positions.device), sections)
    angle = positions.permute(1, 2, 0).index_select(2, axis) * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = states.float().chunk(2, dim=-1)
    turned = states * cosine + torch.cat([-second, first], dim=-1) * sine
    return turned.to(states.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention over (batch, length, heads, size)."""
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, is_causal=causal
    )
    return mixed.transpose(1, 2)

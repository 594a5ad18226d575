"""What differs between model families: the tensors of an item, its embeddings, the rotary positions.

A family that is not in the table is refused at start: a model that is run with wrong positions answers, wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from renderer.errors import ConfigError, RequestError
from renderer.prompt import PlaceholderRange, Tensors


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """How raw pixels become what the vision encoder reads: `(pixels * scale - mean) / std`, per channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One way of being a model.

    Attributes:
        check: Raises RequestError for an item that the encoder could not read, or whose embeddings would not fill its
            range.
        encode: Items' tensors -> embeddings [tokens, features] of each. Runs the vision encoder once.
        positions: Prompt tokens, ranges and tensors -> int64 [rows, tokens], and what to add to later indices.
        position_rows: 3 with a multimodal rotary embedding, else 1.
        max_item: Tensors of the largest item of at most so many tokens, for warm-up.
    """

    check: Callable[[Any, Tensors, PlaceholderRange], None]
    encode: Callable[[Any, PixelFormat, Sequence[Tensors]], list[torch.Tensor]]
    positions: Callable[[Any, NDArray[np.int32], Sequence[tuple[PlaceholderRange, Tensors]]], tuple[Any, int]]
    position_rows: int
    item_of: Callable[[Any, int], Tensors] | None


def find_family(config: Any) -> Family:
    """The family of a checkpoint's config.

    Raises:
        ConfigError: Its `model_type` is not one of those that this engine runs.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"model type {config.model_type!r} is not one that the transformers engine runs: "
            f"it runs {', '.join(sorted(FAMILIES))}. Its render tier works; serve it with another engine."
        )
    return family


def _text_check(model: Any, tensors: Tensors, range_: PlaceholderRange) -> None:
    raise RequestError("this model takes no images")


def _text_encode(model: Any, pixels: PixelFormat, items: Sequence[Tensors]) -> list[torch.Tensor]:
    raise RequestError("this model takes no images")


def _plain_positions(
    model: Any, token_ids: NDArray[np.int32], items: Sequence[tuple[PlaceholderRange, Tensors]]
) -> tuple[NDArray[np.int64], int]:
    return np.arange(len(token_ids), dtype=np.int64)[None], 0


def _qwen_check(model: Any, tensors: Tensors, range_: PlaceholderRange) -> None:
    """`pixel_values` uint8 (raw) or float [patches, channels * time * patch * patch], `image_grid_thw` int64 [3]."""
    vision = model.config.vision_config
    pixels, grid = take_tensors(tensors, "pixel_values", "image_grid_thw")
    if grid.shape != (3,) or grid.dtype != np.int64:
        raise RequestError(f"image_grid_thw must be int64 [3], got {grid.dtype} {list(grid.shape)}")
    merge = vision.spatial_merge_size
    times, height, width = (int(side) for side in grid)
    # Sides beyond this could overflow the product below, and no image has them.
    if times != 1 or not (0 < height < 1 << 20 and 0 < width < 1 << 20) or height % merge or width % merge:
        raise RequestError(f"image_grid_thw {grid.tolist()} is not 1 and two multiples of {merge}")
    columns = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    check_pixels(pixels, (height * width, columns))
    check_count(height * width // merge**2, range_)


def _qwen_encode(model: Any, pixels: PixelFormat, items: Sequence[Tensors]) -> list[torch.Tensor]:
    weight = next(model.model.visual.parameters())
    patches = [normalise(torch.from_numpy(item["pixel_values"]).to(weight.device), pixels) for item in items]
    grids = torch.stack([torch.from_numpy(item["image_grid_thw"]) for item in items]).to(weight.device)
    output = model.model.get_image_features(torch.cat(patches).to(weight.dtype), grids)
    return list(output.pooler_output)


def _qwen_positions(
    model: Any, token_ids: NDArray[np.int32], items: Sequence[tuple[PlaceholderRange, Tensors]]
) -> tuple[NDArray[np.int64], int]:
    if not items:
        return np.broadcast_to(np.arange(len(token_ids), dtype=np.int64), (3, len(token_ids))), 0
    kinds = torch.zeros(1, len(token_ids), dtype=torch.int32)
    for range_, _ in items:
        embed = torch.ones(range_.length) if range_.embed_mask is None else torch.tensor(range_.embed_mask)
        kinds[0, range_.offset : range_.end] = embed.to(torch.int32)
    grids = torch.stack([torch.from_numpy(tensors["image_grid_thw"]) for _, tensors in items])
    ids = torch.from_numpy(token_ids).long()[None]
    positions, deltas = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
    return positions[:, 0].numpy(), int(deltas.item())


def _qwen_item(model: Any, tokens: int) -> Tensors:
    """A nearly square image of at most `tokens` tokens."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    height = max(1, int(tokens**0.5))
    grid = np.array([1, height * merge, max(1, tokens // height) * merge], dtype=np.int64)
    columns = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": np.zeros((int(grid.prod()), columns), dtype=np.uint8), "image_grid_thw": grid}


def take_tensors(tensors: Tensors, *names: str) -> list[NDArray[Any]]:
    """Exactly these tensors, in this order.

    Raises:
        RequestError: One is missing, or there is another.
    """
    if set(tensors) != set(names):
        raise RequestError(f"an image item of this model has the tensors {sorted(names)}, got {sorted(tensors)}")
    return [np.asarray(tensors[name]) for name in names]


def check_pixels(pixels: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raises RequestError unless the pixels have this shape and are uint8 or floats."""
    if pixels.shape != shape:
        raise RequestError(f"pixel_values must be {list(shape)}, got {list(pixels.shape)}")
    if pixels.dtype not in (np.uint8, np.float32, np.float16):
        raise RequestError(f"pixel_values must be uint8, float16 or float32, got {pixels.dtype}")


def check_count(embeds: int, range_: PlaceholderRange) -> None:
    """Raises RequestError unless the item's embeddings fill its range."""
    if embeds != range_.num_embeds:
        raise RequestError(f"an image of {embeds} embeddings stands at a range that takes {range_.num_embeds}")


def normalise(pixels: torch.Tensor, form: PixelFormat) -> torch.Tensor:
    """Raw patches [patches, channels * pixels of a channel] as float32, rescaled and normalised; others as they are."""
    if pixels.dtype != torch.uint8:
        return pixels
    mean = torch.tensor(form.mean, device=pixels.device)[:, None]
    std = torch.tensor(form.std, device=pixels.device)[:, None]
    by_channel = pixels.view(len(pixels), len(form.mean), -1).float()
    return ((by_channel * form.scale - mean) / std).view(len(pixels), -1)


_TEXT = Family(_text_check, _text_encode, _plain_positions, position_rows=1, item_of=None)
_QWEN_VL = Family(_qwen_check, _qwen_encode, _qwen_positions, position_rows=3, item_of=_qwen_item)

FAMILIES: Mapping[str, Family] = {
    "llama": _TEXT,
    "qwen2": _TEXT,
    "qwen3": _TEXT,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
}

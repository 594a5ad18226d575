"""What the vision encoder could not read is found before it is asked, and positions are the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from engine.families import Family
from engine.families.base import PixelFormat, normalise
from engine.model import Model
from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import RequestError
from renderer.families import choose_family
from renderer.prompt import ImageSize, PlaceholderRange, Tensors
from tests.checkpoints import checkpoint
from tests.engine.builders import Picture, Text, engine_config, lab

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "idefics3", "smolvlm")


def family_of(name: str) -> Family:
    return Model(engine_config(checkpoint(name), kv_cache_bytes=1 << 22)).family


def item_of(name: str) -> Tensors:
    return lab(name).prompt(Picture(1)).items[0].tensors or {}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_true_item_has_as_many_embeddings_as_its_range_takes(name: str) -> None:
    family = family_of(name)
    (item,) = lab(name).prompt(Picture(1)).items
    assert family.check(item.tensors or {}) == item.range.num_embeds
    assert [len(embeds) for embeds in family.encode([item.tensors or {}])] == [item.range.num_embeds]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_largest_item_is_the_one_that_the_renderer_makes_of_the_largest_picture(name: str) -> None:
    config = RendererConfig(model=str(checkpoint(name)))
    replacement = choose_family(Checkpoint.load(config), config).replacement(ImageSize(9999, 9999))
    mask = replacement.embed_mask
    embeds = len(replacement.token_ids) if mask is None else sum(mask)
    family = family_of(name)
    assert family.largest_item == embeds
    assert family.check(family.example(embeds)) == embeds


@pytest.mark.parametrize("name", FAMILIES)
def test_examples_are_items_of_at_most_the_size_asked_for(name: str) -> None:
    family = family_of(name)
    for size in {64, min(family.largest_item, 300)}:
        count = family.check(family.example(size))
        assert count <= size or family.check(family.example(1)) == count
        assert count > size // 2


def changed(tensors: Tensors, **values: Any) -> dict[str, Any]:
    return dict(tensors) | values


QWEN_FAULTS: Mapping[str, Any] = {
    "missing tensor": lambda item: {"pixel_values": item["pixel_values"]},
    "unknown tensor": lambda item: changed(item, extra=np.zeros(1)),
    "grid of another dtype": lambda item: changed(item, image_grid_thw=item["image_grid_thw"].astype(np.int32)),
    "grid with a batch": lambda item: changed(item, image_grid_thw=item["image_grid_thw"][None]),
    "grid of another size": lambda item: changed(item, image_grid_thw=item["image_grid_thw"] * 2),
    "grid that does not merge": lambda item: changed(item, image_grid_thw=np.array([1, 1, 16])),
    "negative grid": lambda item: changed(item, image_grid_thw=np.array([1, -4, -4])),
    "zero grid": lambda item: changed(item, image_grid_thw=np.array([1, 0, 0])),
    "two times": lambda item: changed(item, image_grid_thw=np.array([2, 4, 4])),
    "grid that overflows": lambda item: changed(item, image_grid_thw=np.array([1, 1 << 62, 4])),
    "fewer patches": lambda item: changed(item, pixel_values=item["pixel_values"][:-1]),
    "narrower patches": lambda item: changed(item, pixel_values=item["pixel_values"][:, :-1]),
    "flat pixels": lambda item: changed(item, pixel_values=item["pixel_values"].ravel()),
    "signed pixels": lambda item: changed(item, pixel_values=item["pixel_values"].astype(np.int8)),
    "double pixels": lambda item: changed(item, pixel_values=item["pixel_values"].astype(np.float64)),
}
TILE_FAULTS: Mapping[str, Any] = {
    "no mask": lambda item: {"pixel_values": item["pixel_values"]},
    "mask of another shape": lambda item: changed(item, pixel_attention_mask=item["pixel_attention_mask"][:, 1:]),
    "mask of floats": lambda item: changed(item, pixel_attention_mask=item["pixel_attention_mask"].astype(np.float32)),
    "no tiles": lambda item: {name: value[:0] for name, value in item.items()},
    "a tile that the model drops": lambda item: changed(item, pixel_values=item["pixel_values"] * 0),
    "a number": lambda item: changed(item, pixel_values=np.float32(1)),
    "other sides": lambda item: changed(item, pixel_values=item["pixel_values"][..., :-1]),
}


@pytest.mark.parametrize("fault", QWEN_FAULTS.values(), ids=QWEN_FAULTS.keys())
def test_qwen_refuses_what_its_encoder_cannot_read(fault: Any, qwen: Family) -> None:
    with pytest.raises(RequestError):
        qwen.check(fault(item_of("qwen2_5_vl")))


@pytest.mark.parametrize("fault", TILE_FAULTS.values(), ids=TILE_FAULTS.keys())
def test_idefics_refuses_what_its_encoder_cannot_read(fault: Any, idefics: Family) -> None:
    with pytest.raises(RequestError):
        idefics.check(fault(item_of("idefics3")))


def test_llava_refuses_other_sizes() -> None:
    llava = family_of("llava")
    with pytest.raises(RequestError, match="336"):
        llava.check({"pixel_values": np.zeros((3, 224, 224), dtype=np.float32)})


def test_a_text_model_refuses_every_item() -> None:
    with pytest.raises(RequestError, match="no images"):
        family_of("qwen2").check({"pixel_values": np.zeros(1)})


@pytest.fixture(scope="module")
def qwen() -> Family:
    return family_of("qwen2_5_vl")


@pytest.fixture(scope="module")
def idefics() -> Family:
    return family_of("idefics3")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_get_rope_index(name: str) -> None:
    family = family_of(name)
    for parts in ([Text(9)], [Picture(1)], [Text(3), Picture(2, 168, 56), Text(4), Picture(3, 56, 112), Text(2)]):
        prompt = lab(name).prompt(*parts)
        ids = torch.tensor([prompt.token_ids])
        placed = [(item.range, item.tensors or {}) for item in prompt.items]
        grids = [torch.from_numpy(tensors["image_grid_thw"]) for _, tensors in placed]
        wanted, delta = family.model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == family.model.config.image_token_id).int(),
            image_grid_thw=torch.stack(grids) if grids else None,
        )
        positions, offset = family.positions(np.array(prompt.token_ids, dtype=np.int32), placed)
        assert np.array_equal(positions, wanted[:, 0].numpy())
        assert offset == int(delta)


def test_adjacent_pictures_and_a_range_with_marks_have_positions(qwen: Family) -> None:
    (item,) = lab("qwen2_5_vl").prompt(Picture(1)).items
    embeds, tensors = item.range.length, item.tensors or {}
    marked = PlaceholderRange(embeds, embeds + 2, (False, *[True] * embeds, False))
    ids = np.zeros(2 * embeds + 2, dtype=np.int32)
    positions, delta = qwen.positions(ids, [(item.range, tensors), (marked, tensors)])
    assert positions.shape == (3, len(ids))
    side = int(embeds**0.5)
    assert positions[:, embeds].tolist() == [side] * 3
    assert positions[:, -1].tolist() == [2 * side + 1] * 3
    assert delta == 2 * side + 2 - len(ids)


def test_scattered_embeddings_are_refused(qwen: Family) -> None:
    (item,) = lab("qwen2_5_vl").prompt(Picture(1)).items
    mask = [True] * item.range.length
    mask.insert(3, False)
    scattered = PlaceholderRange(0, len(mask), tuple(mask))
    with pytest.raises(RequestError, match="side by side"):
        qwen.positions(np.zeros(len(mask), dtype=np.int32), [(scattered, item.tensors or {})])


def test_raw_pixels_are_rescaled_and_normalised_by_channel() -> None:
    form = PixelFormat(1 / 255, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    raw = torch.tensor([[[0], [51], [255]]], dtype=torch.uint8)
    expected = torch.tensor([[[-1.0], [-0.2], [1.0]]])
    assert torch.allclose(normalise(raw, form, channel_axis=1), expected)
    floats = torch.rand(2, 3)
    assert normalise(floats, form, channel_axis=1) is floats


def test_a_picture_encodes_alike_in_any_company(qwen: Family) -> None:
    items = [lab("qwen2_5_vl").prompt(Picture(seed, 56 * seed, 56)).items[0].tensors or {} for seed in (1, 2, 3)]
    together = qwen.encode(items)
    for item, embeds in zip(items, together, strict=True):
        assert torch.allclose(qwen.encode([item])[0], embeds, atol=1e-5)

"""What an engine gets of an image: the peer's tensors with torchvision's arithmetic, Hugging Face's with Pillow's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor

from renderer.conversation import ChatRequest, media_of
from renderer.families.idefics3 import Idefics3, Masks
from renderer.image import ImageLimits, decode, read_header
from renderer.prompt import RenderedPrompt
from renderer.renderer import Renderer
from renderer.wire import encode_item
from tests.checkpoints import IMAGE_FAMILIES, checkpoint
from tests.families.conftest import RendererOf
from tests.families.test_families import changed
from tests.families.test_goldens import assert_is_the_peers, differs
from tests.goldens.cases import cases, chat, image, pictures, user
from tests.goldens.files import golden
from tests.goldens.pictures import drawing, picture
from tests.goldens.tensors import decode_item

WITH_TENSORS = [
    (family, name)
    for family in IMAGE_FAMILIES
    for name, answer in golden(family)["cases"].items()
    if answer["status"] == 200 and "items" in answer["prompts"][0]
]
# Hugging Face's Pillow classes are slow: shapes of every kind, and one picture of many pixels.
_SIZES = ("640x480.jpg", "97x61.png", "1x1.png", "1x100.png", "500x3.png", "1000x20.png", "300x2000.jpg", "336x336.png")
ALONE = [
    (family, name)
    for family, name in WITH_TENSORS
    if name.startswith("options ") or name.endswith(_SIZES) or (family, name) == ("llava", "size rgb-4096x3072.jpg")
]
# What a family's multimodal processor sets on its image processor, or the peer's engine asks of it.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    },
    "internvl": {"crop_to_patches": True},
    "mistral3": {"patch_size": {"height": 28, "width": 28}, "do_rescale": False, "do_normalize": False},
    **{family: {"do_rescale": False, "do_normalize": False} for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
}
LIMITS = ImageLimits(max_bytes=1 << 25, max_pixels=1 << 26)


def request_of(family: str, name: str) -> ChatRequest:
    request = cases(family)[name].request
    assert isinstance(request, ChatRequest)
    return request


def render(renderer: Renderer, request: ChatRequest) -> RenderedPrompt:
    return renderer.render_chat(request, skip_mm_cache=True)


def within_one_ulp(dtype: torch.dtype, ours: list[float], theirs: list[float]) -> bool:
    """Whether values of a half float differ by one unit in its last place at most."""
    bits = torch.tensor([ours, theirs]).to(dtype).view(torch.int16).int()
    ordered = torch.where(bits < 0, -32768 - bits, bits)
    return bool(((ordered[0] - ordered[1]).abs() <= 1).all())


def same_on_the_wire(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two recorded tensors are equal to the byte or, being floats, to one unit in the last place."""
    if "samples" in ours and ours["digest"] != theirs["digest"]:
        other = {"digest": theirs["digest"], "samples": theirs["samples"]}
        dtype = getattr(torch, ours["dtype"])
        return {**ours, **other} == theirs and within_one_ulp(dtype, ours["samples"], theirs["samples"])
    return ours == theirs


def hugging_face(
    family: str, pixels: NDArray[np.uint8], options: Mapping[str, Any], backend: str = "pil"
) -> Mapping[str, Any]:
    """What Hugging Face's own class of a backend makes of one image."""
    processor = AutoImageProcessor.from_pretrained(checkpoint(family), backend=backend)
    if family.startswith("qwen"):
        options = {"size": processor.size, **with_size(processor, options)}
    settings = {**SETTINGS.get(family, {}), **options}
    output: Mapping[str, Any] = processor(Image.fromarray(pixels), return_tensors="np", **settings)
    return output


def with_size(processor: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of Qwen in the newer spelling, which does not warn."""
    size = dict(processor.size) | dict(options.get("size", {}))
    names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    return {"size": size | {names[name]: value for name, value in options.items() if name in names}}


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_the_pictures_are_those_that_were_recorded(family: str) -> None:
    digests = {name: blake3(picture(name)).hexdigest(length=8) for name in pictures(family)}
    assert digests == golden(family)["pictures"], "another Pillow encodes them otherwise: record the goldens again"


@pytest.mark.parametrize(("family", "name"), WITH_TENSORS)
def test_prompt_and_torchvision_tensors_are_the_peers_and_the_layout_is_the_same_prompt(
    family: str, name: str, renderer_of: RendererOf
) -> None:
    renderer, request = renderer_of(family), request_of(family, name)
    prompt = render(renderer, request)
    assert prompt.layout() == renderer.layout(request)
    recorded = golden(family)["cases"][name]["prompts"][0]
    if not differs(family, name):
        assert_is_the_peers(prompt, recorded)
    for item, theirs in zip(prompt.items, recorded["items"], strict=True):
        assert item.tensors is not None
        ours = decode_item(encode_item(item.tensors, renderer.family.fields, renderer.float_type))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert same_on_the_wire(ours[key], theirs[key]), key


@pytest.mark.parametrize(("family", "name"), ALONE)
def test_pillow_tensors_are_hugging_faces(family: str, name: str, renderer_of: RendererOf) -> None:
    request = request_of(family, name)
    prompt = render(renderer_of(family, image_backend="pil"), request)
    assert prompt.layout() == renderer_of(family).layout(request)
    (item,) = prompt.items
    (part,) = media_of(request)
    assert part.data is not None
    assert item.tensors is not None
    pixels = decode(part.data, read_header(part.data, 0, LIMITS), 0)
    expected = hugging_face(family, pixels, request.mm_processor_kwargs)
    compared = item.tensors.keys() & expected.keys()
    assert {"pixel_values"} <= compared
    for key in compared:
        theirs = expected[key].reshape(item.tensors[key].shape)
        # Hugging Face widens raw pixels, which stay uint8 here.
        assert item.tensors[key].dtype in (theirs.dtype, np.uint8), key
        np.testing.assert_array_equal(item.tensors[key], theirs)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("options", [{"size": {"longest_edge": 1024}}, {"do_image_splitting": False}], ids=str)
def test_tiles_cut_here_are_those_of_hugging_faces_class(
    family: str, options: Mapping[str, Any], renderer_of: RendererOf
) -> None:
    chosen = renderer_of(family).family.with_options(options)
    assert isinstance(chosen, Idefics3)
    assert chosen.written_out
    for size in ((90, 60), (60, 90), (1, 70), (64, 64), (300, 20)):
        pixels = np.array(drawing(*size))
        tensors, theirs = chosen.tensors(pixels), chosen.processor(pixels)
        for name in ("pixel_values", "pixel_attention_mask"):
            np.testing.assert_array_equal(tensors[name], theirs[name][0])
            assert tensors[name].dtype == theirs[name].dtype


def test_a_processor_that_leaves_a_step_out_cuts_its_tiles_itself(tmp_path: Path) -> None:
    renderer = Renderer(changed("smolvlm", tmp_path, "preprocessor_config.json", do_normalize=False))
    (item,) = render(renderer, chat(user(image("rgb-97x61.png")))).items
    assert item.tensors is not None
    assert 0 <= item.tensors["pixel_values"].min() < item.tensors["pixel_values"].max() <= 1
    renderer.close()


def test_masks_of_ones_share_their_memory() -> None:
    masks = Masks(4)
    five, two = masks.of(5), masks.of(2)
    assert np.shares_memory(five, two)
    assert np.shares_memory(five, masks.of(5))
    assert (five.shape, two.shape) == ((5, 4, 4), (2, 4, 4))
    assert five.all()
    assert not two.flags.writeable
    assert masks.of(7).all()

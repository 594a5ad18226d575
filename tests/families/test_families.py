"""Of every family: as many placeholders as the model makes embeddings, layouts without pixels."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, ImagePart
from renderer.errors import ConfigError, MediaError, RequestError
from renderer.prompt import ImageSize, RenderedPrompt
from renderer.renderer import Renderer
from tests.checkpoints import CHECKPOINTS, FAMILIES, IMAGE_FAMILIES, checkpoint
from tests.families.conftest import RendererOf
from tests.goldens.cases import cases, chat, image, user
from tests.goldens.files import golden
from tests.goldens.pictures import picture

SHAPES = ("rgb-640x480.jpg", "rgb-97x61.png", "rgb-1x100.png", "rgb-1000x20.png", "rgb-300x2000.jpg")
LAID_OUT = [
    (family, name)
    for family in IMAGE_FAMILIES
    for name, answer in golden(family)["cases"].items()
    if answer["status"] == 200 and "ranges" in answer["prompts"][0] and "items" not in answer["prompts"][0]
    if not name.startswith(("a text that spells", "eight"))
]
BATCHED = {"llava", "llava_next", "llava_onevision", "pixtral", "mistral3", "paligemma", "idefics3", "smolvlm"}


def render(renderer: Renderer, request: ChatRequest) -> RenderedPrompt:
    return renderer.render_chat(request, skip_mm_cache=True)


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, CHECKPOINTS[family].model).from_pretrained(checkpoint(family), dtype=torch.float32)


def embeddings(family: str, model: Any, tensors: dict[str, Any]) -> int:
    """Embeddings that the family's model makes of one image's tensors."""
    inputs = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    inputs["pixel_values"] = inputs["pixel_values"].float()
    if family in ("pixtral", "mistral3"):
        inputs["image_sizes"] = torch.tensor(inputs["pixel_values"].shape[-2:])
    for name in ("num_patches", "image_num_patches", "image_token_id"):
        inputs.pop(name, None)
    for name in inputs.keys() - (set() if family in BATCHED else {"pixel_values"}):
        inputs[name] = inputs[name][None]
    with torch.inference_mode():
        features = model.model.get_image_features(**inputs).pooler_output
    parts = features if isinstance(features, (tuple, list)) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_a_range_carries_as_many_embeddings_as_the_model_makes(family: str, renderer_of: RendererOf) -> None:
    model = model_of(family)
    for name in SHAPES:
        (item,) = render(renderer_of(family), chat(user(image(name), "What?"))).items
        assert item.tensors is not None
        assert item.range.num_embeds == embeddings(family, model, dict(item.tensors)), name


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_embeddings_go_where_the_models_image_token_stands(family: str, renderer_of: RendererOf) -> None:
    token_id = transformers.AutoConfig.from_pretrained(checkpoint(family)).image_token_id
    prompt = renderer_of(family).layout(chat(user("See ", image(SHAPES[0]), " and say.")))
    (item,) = prompt.items
    inside = prompt.token_ids[item.range.offset : item.range.end]
    mask = item.range.embed_mask or (True,) * item.range.length
    assert mask == tuple(inner == token_id for inner in inside)
    assert prompt.token_ids.count(token_id) == item.range.num_embeds


@pytest.mark.parametrize(("family", "name"), [pytest.param(f, n, id=f"{f}: {n}") for f, n in LAID_OUT])
def test_a_layout_is_the_rendered_prompt_without_tensors(family: str, name: str, renderer_of: RendererOf) -> None:
    request = cases(family)[name].request
    assert isinstance(request, ChatRequest)
    renderer = renderer_of(family)
    assert render(renderer, request).layout() == renderer.layout(request)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_a_layout_needs_no_pixels(family: str, renderer_of: RendererOf) -> None:
    whole = picture("rgb-640x480.jpg")
    request = chat(user(ImagePart(data=whole[: len(whole) // 8]), "What?"))
    prompt = renderer_of(family).layout(request)
    assert prompt.token_ids == renderer_of(family).layout(chat(user(image("rgb-640x480.jpg"), "What?"))).token_ids
    with pytest.raises(MediaError):
        render(renderer_of(family), request)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize(("width", "height"), [(1, 1100), (3000, 1), (1, 9000)])
def test_a_thread_of_pixels_is_laid_out_as_it_is_rendered_or_refused_by_both(
    family: str, width: int, height: int, renderer_of: RendererOf
) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "green").save(stream, "PNG")
    renderer = renderer_of(family)
    before = [image("rgb-28x28.png")] if renderer.family.max_items != 1 else []
    request = chat(user(*before, ImagePart(data=stream.getvalue()), "What?"))

    def outcome(rendering: Callable[[], RenderedPrompt]) -> RenderedPrompt | tuple[str, int | None, int]:
        try:
            return rendering().layout()
        except MediaError as error:
            return str(error), error.index, error.status

    laid_out = outcome(lambda: renderer.layout(request))
    assert laid_out == outcome(lambda: render(renderer, request))
    if isinstance(laid_out, RenderedPrompt):
        assert all(item.range.num_embeds > 0 for item in laid_out.items)
    else:
        assert laid_out[1:] == (len(before), 400)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_the_largest_image_fits_the_tokens_allowed(family: str, renderer_of: RendererOf) -> None:
    chosen = renderer_of(family).family
    most = len(chosen.replacement(chosen.largest_image(1 << 20)).token_ids)
    usual = (ImageSize(640, 480), ImageSize(1280, 720), ImageSize(300, 2000), ImageSize(4000, 3000))
    assert all(len(chosen.replacement(size).token_ids) <= most for size in usual)
    assert len(chosen.replacement(chosen.largest_image(most - 1)).token_ids) <= most


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_options_that_a_family_does_not_take_are_refused_by_name(family: str, renderer_of: RendererOf) -> None:
    for options in ({"do_normalize": False}, {"return_tensors": "pt"}, {"size": {"longest_edge": 0}}, {"size": 7}):
        with pytest.raises(RequestError) as refusal:
            renderer_of(family).layout(chat(user(image("rgb-97x61.png")), mm_processor_kwargs=options))
        assert str(refusal.value.param).startswith("mm_processor_kwargs")


def test_options_of_the_configuration_are_checked_at_start() -> None:
    for family in ("internvl", "gemma3", "llava"):
        with pytest.raises(ConfigError, match="surprise"):
            Renderer(RendererConfig(model=str(checkpoint(family)), mm_processor_kwargs={"surprise": 1}))


def test_options_of_the_configuration_hold_for_every_request(renderer_of: RendererOf) -> None:
    configured = Renderer(RendererConfig(model=str(checkpoint("internvl")), mm_processor_kwargs={"max_patches": 4}))
    request = chat(user(image("rgb-1280x720.jpg"), "What?"))
    asked = chat(user(image("rgb-1280x720.jpg"), "What?"), mm_processor_kwargs={"max_patches": 4})
    assert configured.layout(request).token_ids == renderer_of("internvl").layout(asked).token_ids
    configured.close()


def test_a_thread_of_pixels_is_refused_where_it_would_be_blown_up(renderer_of: RendererOf) -> None:
    family = renderer_of("llava").family
    assert len(family.replacement(ImageSize(1, 400)).token_ids) == 576
    with pytest.raises(ValueError, match="too unlike"):
        family.replacement(ImageSize(60_000, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_recorded_case_is_a_case(family: str) -> None:
    assert set(golden(family)["cases"]) == set(cases(family)), "record the goldens again"


def changed(family: str, folder: Path, file: str, **values: Any) -> RendererConfig:
    """A renderer's configuration for a copy of the checkpoint with other values in one of its files."""
    copy = folder / family
    shutil.copytree(checkpoint(family), copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, **values}))
    return RendererConfig(model=str(copy))


def test_a_model_of_an_unknown_family_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    config = changed("qwen2", tmp_path, "config.json", model_type="blip-2", architectures=None)
    with pytest.raises(ConfigError, match=r"'blip-2' cannot be rendered; known are qwen2_vl, .*gemma3.*text-only"):
        Renderer(config)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_models_with_the_processor_of_qwen3_vl_are_rendered_as_it_is(
    model_type: str, tmp_path: Path, renderer_of: RendererOf
) -> None:
    renderer = Renderer(changed("qwen3_vl", tmp_path, "config.json", model_type=model_type))
    request = chat(user("See ", image("rgb-97x61.png"), " and ", image("rgb-28x28.png")))
    prompt, expected = render(renderer, request), render(renderer_of("qwen3_vl"), request)
    assert prompt.token_ids == expected.token_ids
    for item, other in zip(prompt.items, expected.items, strict=True):
        assert item.range == other.range
        assert item.tensors is not None
        assert other.tensors is not None
        assert all(np.array_equal(item.tensors[name], other.tensors[name]) for name in other.tensors)
    renderer.close()


@pytest.mark.parametrize(
    ("family", "file", "values", "reason"),
    [
        ("llava", "config.json", {"vision_feature_select_strategy": "class"}, "vision_feature_select_strategy"),
        ("llava_onevision", "config.json", {"vision_aspect_ratio": "square"}, "'square' is not known"),
        ("paligemma", "tokenizer_config.json", {"bos_token": None}, "begin token"),
        ("smolvlm", "preprocessor_config.json", {"max_image_size": {"longest_edge": 384}}, "max_image_size"),
        ("qwen2_vl", "preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "shortest_edge"),
    ],
)
def test_a_checkpoint_that_is_made_otherwise_is_refused_at_start(
    family: str, file: str, values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        Renderer(changed(family, tmp_path, file, **values))


def test_a_processor_that_only_rescales_gives_values_up_to_one(tmp_path: Path) -> None:
    renderer = Renderer(changed("llava", tmp_path, "preprocessor_config.json", do_normalize=False))
    (item,) = render(renderer, chat(user(image("rgb-336x336.png")))).items
    assert item.tensors is not None
    with Image.open(io.BytesIO(picture("rgb-336x336.png"))) as opened:
        expected = np.asarray(opened).transpose(2, 0, 1) * np.float32(1 / 255)
    np.testing.assert_array_equal(item.tensors["pixel_values"], expected)
    renderer.close()

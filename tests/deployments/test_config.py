from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.config import PROJECT, GreenroomConfig, find_model
from deployments.launch.config_file import SERVE_CONFIG

MODEL = "demo/model"


def configured(**args: Any) -> GreenroomConfig:
    return GreenroomConfig.model_validate({"model": MODEL, **args})


def test_the_model_flows_into_both_tiers_and_its_name_is_as_given() -> None:
    config = configured()
    assert config.render is not None
    assert config.engine is not None
    path = str(PROJECT / MODEL)
    assert {config.model, config.render.renderer.model, config.engine.renderer.model, config.engine.engine.model} == {
        path
    }
    assert config.served_model_names == (MODEL,)


def test_strings_of_a_command_line_are_understood() -> None:
    config = configured(max_model_len="1024")
    assert config.engine is not None
    assert config.engine.engine.max_model_len == 1024


def test_renderer_options_at_the_top_are_those_of_both_tiers() -> None:
    config = configured(renderer={"max_image_pixels": 1000}, render={"renderer": {"media_threads": 7}})
    assert config.render is not None
    assert config.engine is not None
    assert config.render.renderer.max_image_pixels == config.engine.renderer.max_image_pixels == 1000
    assert (config.render.renderer.media_threads, config.engine.renderer.media_threads) == (7, 2)


@pytest.mark.parametrize("tier", ["render", "engine"])
def test_a_tier_that_is_null_is_left_out(tier: str) -> None:
    assert getattr(configured(**{tier: None}), tier) is None


def test_the_same_model_spelled_otherwise_agrees() -> None:
    assert configured(engine={"engine": {"model": str(PROJECT / MODEL)}}).engine is not None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"render": None, "engine": None}, "nothing would be served"),
        ({"render": {"renderer": {"model": "other"}}}, "model: a tier has 'other'"),
        ({"engine": {"engine": {"model": "other"}}}, "model: the renderer has"),
        ({"engine": {"engine": {"max_model_len": 100}}}, "max_model_len: the renderer has None"),
        ({"render": {"renderer": {"max_model_len": 100}}}, "max_model_len: the render tier has 100"),
        ({"render": {"renderer": {"image_backend": "pil"}}}, "image_backend: the render tier has 'pil'"),
        ({"engine": {"renderer": {"mm_processor_kwargs": {"a": 1}}}}, "mm_processor_kwargs: the render tier has {}"),
        ({"engine": {"max_ongoing_requests": 2}}, "would never fill the engine"),
        ({"served_model_names": ["a", "a"]}, "repeated"),
        ({"modle": "x"}, "modle"),
        ({"render": {"renderer": {"media_thread": 1}}}, "media_thread"),
        ({"engine": {"engine": {"max_num_seqs": 0}}}, "max_num_seqs"),
        ({"model": ""}, "model"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        configured(**args)


def test_a_missing_model_is_the_only_complaint() -> None:
    with pytest.raises(ValidationError) as caught:
        GreenroomConfig.model_validate({})
    assert [error["loc"] for error in caught.value.errors()] == [("model",)]


def test_a_hub_id_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("here") == str(tmp_path / "here")


def test_the_shipped_file_names_every_deployment() -> None:
    (application,) = yaml.safe_load(SERVE_CONFIG.read_text())["applications"]
    assert [entry["name"] for entry in application["deployments"]] == ["Router", "RenderReplica", "EngineReplica"]
    assert GreenroomConfig.model_validate(application["args"]).served_model_names == (MODEL,)

"""What a checkpoint says is read without its weights; what cannot be served is refused at start."""

import json
import shutil
from pathlib import Path

import pytest

from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.errors import ConfigError
from renderer.families import FAMILIES, choose_family
from renderer.renderer import Renderer
from tests.checkpoints import checkpoint
from tests.renderer.builders import DEMO, chat


def copy_without(folder: Path, *names: str) -> Path:
    """The demo model in another folder, without some of its files and without weights."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", *names))
    return folder


def load(folder: Path | str) -> Checkpoint:
    return Checkpoint.load(RendererConfig(model=str(folder)))


def test_no_weights_are_needed(tmp_path: Path) -> None:
    renderer = Renderer(RendererConfig(model=str(copy_without(tmp_path / "model"))))
    assert renderer.render_chat(chat("hi")).token_ids
    renderer.close()


def test_a_checkpoint_says_what_it_was_made_for() -> None:
    demo = load(DEMO)
    assert demo.model_type == "qwen2_5_vl"
    assert demo.max_model_len == 4096
    assert demo.generation_defaults() == json.loads((DEMO / "generation_config.json").read_text())
    assert demo.chat_template() == (DEMO / "chat_template.jinja").read_text()


def test_what_is_optional_may_be_missing(tmp_path: Path) -> None:
    bare = load(copy_without(tmp_path / "model", "generation_config.json", "chat_template.jinja"))
    assert bare.generation_defaults() == {}
    assert bare.chat_template() is None


def test_the_older_file_of_the_chat_template_is_read(tmp_path: Path) -> None:
    folder = copy_without(tmp_path / "model", "chat_template.jinja")
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    assert load(folder).chat_template() == "{{ messages }}"


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the checkpoint"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "llama", "max_position_embeddings": "long"}'])
def test_a_broken_configuration_is_refused(tmp_path: Path, config: str) -> None:
    folder = copy_without(tmp_path / "model")
    (folder / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="cannot read the checkpoint"):
        load(folder)


def test_a_checkpoint_that_does_not_say_its_length_needs_it_from_the_configuration(tmp_path: Path) -> None:
    folder = copy_without(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="set max_model_len"):
        _ = load(folder).max_model_len
    renderer = Renderer(RendererConfig(model=str(folder), max_model_len=77))
    assert renderer.max_model_len == 77
    renderer.close()


def test_a_family_is_chosen_by_the_models_type() -> None:
    assert choose_family(load(DEMO), RendererConfig(model=str(DEMO))).name == "qwen2_5_vl"
    for name in ("qwen2", "llama"):
        family = choose_family(load(checkpoint(name)), RendererConfig(model="m"))
        assert (family.name, family.modalities, family.placeholder) == ("text-only", (), None)


@pytest.mark.parametrize("model_type", ["clip", "whisper", "mllama"])
def test_a_model_of_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path, model_type: str) -> None:
    folder = copy_without(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigError) as caught:
        Renderer(RendererConfig(model=str(folder), max_model_len=100))
    assert model_type in str(caught.value)
    for known in (*FAMILIES, "text-only"):
        assert known in str(caught.value)

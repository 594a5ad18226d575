"""The tests' checkpoints are what the other tests take them for: loadable, reproducible, true to their families."""

import hashlib
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from tests.checkpoints import CHECKPOINTS, FAMILIES, IMAGE_FAMILIES, checkpoint

MIB = 1024 * 1024
TEXTS = ("Hello, wörld!\n\n日本 😀 x  y\t\n\n\n z", " lead", "a\n\n\n\n\nb", "\x00\x7f ok", "")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_loads_and_its_tokenizer_gives_any_text_back(family: str) -> None:
    folder = checkpoint(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    spec = CHECKPOINTS[family].tokenizer
    for token in (*spec.first, *spec.last):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1, token
    assert AutoConfig.from_pretrained(folder).get_text_config().vocab_size == len(tokenizer)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_the_image_processor_loads_without_torchvision(family: str) -> None:
    assert type(AutoImageProcessor.from_pretrained(checkpoint(family))).__name__.endswith("Pil")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_small(family: str) -> None:
    assert sum(path.stat().st_size for path in checkpoint(family).iterdir()) < 3 * MIB


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava"])
def test_building_twice_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    CHECKPOINTS[family].write(tmp_path / family)
    assert digests(tmp_path / family) == digests(checkpoint(family))


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_runs_of_newlines_are_single_tokens_of_gemma(family: str) -> None:
    vocabulary = AutoTokenizer.from_pretrained(checkpoint(family)).get_vocab()
    assert {"\n", "\n\n", "\n\n\n", "\n\n\n\n"} <= set(vocabulary)

"""torchvision is neither needed nor, where it is installed, called: transformers itself imports names of it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from blake3 import blake3

from renderer.renderer import Renderer
from tests.families.conftest import RendererOf
from tests.goldens.cases import chat, image, user

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen2_5_vl", "llava_next", "gemma3", "mistral3")
PROGRAM = f"""
import sys
from renderer.config import RendererConfig
from renderer.renderer import Renderer
from tests.checkpoints import checkpoint
from tests.families.test_torchvision import digest
from transformers.utils import is_torchvision_available
print(is_torchvision_available())
for family in {FAMILIES!r}:
    renderer = Renderer(RendererConfig(model=str(checkpoint(family)), processor_cache_bytes=0))
    print(digest(renderer))
    renderer.close()
print("torchvision" in sys.modules)
"""


def digest(renderer: Renderer) -> str:
    """Of everything that is rendered of an image."""
    prompt = renderer.render_chat(chat(user(image("rgb-640x480.jpg"), "What?")), skip_mm_cache=True)
    tensors = prompt.items[0].tensors or {}
    hasher = blake3(repr(prompt.token_ids).encode())
    for name in sorted(tensors):
        hasher.update(name.encode() + tensors[name].tobytes())
    return hasher.hexdigest()


# As much of it as transformers imports where it finds one. Whatever is called fails.
CALLED = """
def called(*_, **__):
    raise AssertionError("torchvision was called")
"""
INTERPOLATION = """
from enum import Enum
InterpolationMode = Enum("InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")
"""


def write_torchvision(folder: Path) -> None:
    """A torchvision that can be imported and computes nothing."""
    files = {
        "torchvision/__init__.py": "from torchvision import io, transforms",
        "torchvision/io.py": CALLED + "ImageReadMode = decode_image = called",
        "torchvision/transforms/__init__.py": INTERPOLATION,
        "torchvision/transforms/functional.py": CALLED + "pil_to_tensor = called",
        "torchvision/transforms/v2/__init__.py": "",
        "torchvision/transforms/v2/functional.py": CALLED + "__getattr__ = lambda name: called",
        "torchvision-0.28.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="it is installed: tests/vllm/test_torchvision.py")
def test_an_installed_torchvision_is_not_called_and_changes_nothing(renderer_of: RendererOf, tmp_path: Path) -> None:
    write_torchvision(tmp_path)
    expected = [digest(renderer_of(family)) for family in FAMILIES]
    assert "torchvision" not in sys.modules
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", *expected, "True"]

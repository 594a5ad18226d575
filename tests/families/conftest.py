"""Renderers of every family's checkpoint, each made once."""

from collections.abc import Callable, Iterator

import pytest
import torch

from renderer.config import RendererConfig
from renderer.renderer import Renderer
from tests.checkpoints import checkpoint

torch.set_num_threads(1)
RendererOf = Callable[..., Renderer]
USUAL = {"processor_cache_bytes": 0, "trust_request_chat_template": True, "trust_request_mm_kwargs": True}


@pytest.fixture(scope="session")
def renderer_of() -> Iterator[RendererOf]:
    """`renderer_of(family, **config)`: a renderer called by the name that the peer was called by; without caches,
    unless the configuration has some.

    The model's name is part of every hash, and the recorded one is the folder's name alone: so the checkpoints'
    folder is where the renderers are made.
    """
    made: dict[tuple[object, ...], Renderer] = {}

    def make(family: str, **config: object) -> Renderer:
        key = (family, *sorted(config.items()))
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(checkpoint(family).parent)
                made[key] = Renderer(RendererConfig.model_validate({"model": family, **USUAL, **config}))
        return made[key]

    yield make
    for renderer in made.values():
        renderer.close()

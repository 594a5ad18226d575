"""Renderers that the tests share, and hypothesis without a clock."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from renderer.caches import SenderCache
from renderer.renderer import Renderer
from tests.renderer.builders import demo_renderer

settings.register_profile("renderer", deadline=None)
settings.load_profile("renderer")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Iterator[Renderer]:
    """A renderer without an engine and without caches, for tests that look at its prompts alone."""
    renderer = demo_renderer(processor_cache_bytes=0, trust_request_mm_kwargs=True, trust_request_chat_template=True)
    yield renderer
    renderer.close()


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    """A renderer beside an engine, with empty caches of its own."""
    renderer = demo_renderer(SenderCache(64 * 1024 * 1024))
    yield renderer
    renderer.close()

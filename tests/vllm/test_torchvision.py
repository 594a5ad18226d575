"""With torchvision installed: what is computed without it are the tensors of Hugging Face's torchvision classes."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.utils import is_torchvision_available

from renderer.conversation import media_of
from renderer.image import decode, read_header
from renderer.prompt import Tensors
from tests.checkpoints import IMAGE_FAMILIES
from tests.families.conftest import RendererOf, renderer_of
from tests.families.test_tensors import LIMITS, hugging_face
from tests.goldens.cases import chat, image, user

__all__ = ["renderer_of"]
PICTURES = ("rgb-640x480.jpg", "rgb-97x61.png", "rgb-1x100.png", "rgb-300x2000.jpg")


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_tensors_are_those_of_the_backends_own_class(family: str, backend: str, renderer_of: RendererOf) -> None:
    assert is_torchvision_available()
    for name in PICTURES:
        request = chat(user(image(name), "What?"))
        (item,) = renderer_of(family, image_backend=backend).render_chat(request, skip_mm_cache=True).items
        (part,) = media_of(request)
        assert part.data is not None
        pixels = decode(part.data, read_header(part.data, 0, LIMITS), 0)
        expected = hugging_face(family, pixels, {}, backend)
        tensors: Tensors = item.tensors or {}
        assert "pixel_values" in tensors.keys() & expected.keys()
        for key in tensors.keys() & expected.keys():
            theirs = np.asarray(expected[key]).reshape(np.shape(tensors[key]))
            np.testing.assert_array_equal(np.asarray(tensors[key]), theirs, err_msg=f"{name} {key}")

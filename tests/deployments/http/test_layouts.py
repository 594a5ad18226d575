"""Layouts over the routes, of every format and every kind of file: equal to the full rendering, and without a pixel."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest
from PIL import Image, ImageFile

from deployments.config import GreenroomConfig
from renderer.image import FORMATS
from tests.renderer.test_image import FILES

CONFIG = GreenroomConfig.model_validate(
    {"model": "demo/model", "renderer": {"processor_cache_bytes": 0}, "engine": None}
)
CHAT = "/v1/chat/completions/render"


def forbid_decoding(patch: pytest.MonkeyPatch) -> None:
    """Make Pillow raise wherever it would decode a pixel, in whatever plugin."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a pixel was decoded")

    plugins = {form: Image.OPEN[form][0] for form in FORMATS}
    loaders = {kind for plugin in plugins.values() if isinstance(plugin, type) for kind in plugin.__mro__}
    for kind in loaders | set(ImageFile.ImageFile.__subclasses__()) | {Image.Image, ImageFile.ImageFile}:
        if "load" in vars(kind):
            patch.setattr(kind, "load", refuse)
    patch.setattr(Image, "_getdecoder", refuse)


def showing(data: bytes, **fields: Any) -> dict[str, Any]:
    url = "data:image/any;base64," + base64.b64encode(data).decode()
    parts = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}], **fields}


def laid_out(answer: dict[str, Any]) -> tuple[Any, ...]:
    features = answer["features"]
    return answer["token_ids"], features["mm_placeholders"], features["mm_hashes"]


@pytest.mark.parametrize("name", FILES)
async def test_a_layout_and_a_tokenization_decode_no_pixel_of_any_file(
    http: httpx.AsyncClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = (await http.post(CHAT, json=showing(FILES[name]))).json()
    with monkeypatch.context() as patch:
        forbid_decoding(patch)
        layout = (await http.post(CHAT, json=showing(FILES[name], mm_payload="none"))).json()
        tokens = (await http.post("/tokenize", json=showing(FILES[name]))).json()
    assert layout["features"]["kwargs_data"] is None
    assert laid_out(layout) == laid_out(full)
    assert tokens["tokens"] == full["token_ids"]


@pytest.mark.parametrize("name", FILES)
async def test_a_pixel_that_is_decoded_does_not_go_unnoticed(
    http: httpx.AsyncClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_decoding(monkeypatch)
    response = await http.post(CHAT, json=showing(FILES[name]))
    assert (response.status_code, "a pixel was decoded" in response.text) == (400, True)


def test_every_format_that_is_taken_is_among_the_files() -> None:
    extensions = {name.rsplit(".", 1)[1] for name in FILES}
    known = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
    assert {known.get(form, form.lower()) for form in FORMATS} <= extensions

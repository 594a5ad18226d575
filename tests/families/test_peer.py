"""The peer itself, live: it still answers as recorded, its engine takes what we render, Hugging Face counts as we do.

Run by `make test-peer PEER=/path/to/a/virtual/environment/of/vLLM/0.32`.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.answers.rendered import ItemCodec, render_answer
from deployments.calls import Envelope, RenderCall, SamplingRequest
from deployments.sampling import resolve
from renderer.conversation import ChatRequest, media_of
from renderer.errors import RequestError
from renderer.renderer import Renderer
from tests.checkpoints import FAMILIES, IMAGE_FAMILIES, checkpoint
from tests.families.conftest import RendererOf
from tests.goldens.cases import Case, body, cases
from tests.goldens.files import golden
from tests.goldens.peer import peer
from tests.goldens.record import record

pytestmark = pytest.mark.peer

GREEDY = SamplingRequest(max_tokens=16, temperature=0.0)
ASKED = ("text", "size rgb-224x224.png", "size rgb-1000x20.png", "three images among texts", "the same image twice")
# Five newlines that the tokenizer would cut into four and one, if it were asked again once the image is there.
DIFFERENT = {("gemma3", "images for a template of strings")}


def peer_venv() -> Path:
    folder = Path(os.environ.get("GREENROOM_PEER") or "no peer: set PEER")
    assert (folder / "bin" / "vllm").exists(), folder
    return folder


@pytest.fixture(scope="module")
def venv() -> Path:
    return peer_venv()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_peer_answers_as_recorded(family: str, venv: Path) -> None:
    with peer(venv, checkpoint(family)) as address:
        assert record(family, address) == golden(family)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_peers_engine_says_the_same_to_our_prompt_as_to_its_own(
    family: str, venv: Path, renderer_of: RendererOf
) -> None:
    renderer = renderer_of(family)
    with peer(venv, checkpoint(family), engine=True) as address, httpx.Client(base_url=address, timeout=300) as client:
        for name in ASKED:
            case = cases(family)[name]
            asked = {**body(case, family), "temperature": 0.0, "max_tokens": 16, "repetition_penalty": 1.0}
            own = client.post("/v1/chat/completions", json=asked).raise_for_status().json()
            ours = client.post("/inference/v1/generate", json=generate_request(renderer, case))
            assert ours.raise_for_status().json()["choices"][0]["text"] == own["choices"][0]["message"]["content"], name


def generate_request(renderer: Renderer, case: Case) -> dict[str, Any]:
    """What our render endpoint answers to a case."""
    assert isinstance(case.request, ChatRequest)
    prompt = renderer.render_chat(case.request, skip_mm_cache=True)
    params = resolve(GREEDY, {}, len(prompt.token_ids), 4096)
    call = RenderCall(case.request, GREEDY, Envelope("test"), skip_mm_cache=True)
    codec = ItemCodec(renderer.family.fields, renderer.float_type)
    return {**json.loads(b"".join(render_answer(call, [prompt], [params], codec))), "output_mode": "text"}


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_token_ids_are_those_of_hugging_faces_processor(
    family: str, venv: Path, renderer_of: RendererOf, tmp_path: Path
) -> None:
    renderer = renderer_of(family)
    asked = {name: case.request for name, case in cases(family).items() if is_compared(family, name, case, renderer)}
    questions = [
        {
            "checkpoint": str(checkpoint(family)),
            "text": renderer.text(request),
            "images": [base64.b64encode(part.data or b"").decode() for part in media_of(request)],
        }
        for request in asked.values()
        if isinstance(request, ChatRequest)
    ]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(questions))
    script = Path(__file__).with_name("hugging_face_ids.py")
    answer = subprocess.run(
        [venv / "bin" / "python", script, file],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    for (name, request), ids in zip(asked.items(), json.loads(answer.stdout.splitlines()[-1]), strict=True):
        assert isinstance(request, ChatRequest)
        assert (list(renderer.layout(request).token_ids) == ids) == ((family, name) not in DIFFERENT), name


def is_compared(family: str, name: str, case: Case, renderer: Renderer) -> bool:
    """Whether it is a chat about images that we take, at the model's own size."""
    if not isinstance(case.request, ChatRequest) or not media_of(case.request):
        return False
    if name.startswith(("format", "options", "a text that spells", "eight")):
        return False
    try:
        renderer.layout(case.request)
    except RequestError:
        return False
    return True

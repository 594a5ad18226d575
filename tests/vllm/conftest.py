"""One vLLM at a time, of a tiny checkpoint in float32, with room for three pictures in its receiver cache."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
from PIL import Image

from engine.protocol import EngineOutput, SamplingParams
from engine.vllm_config import VllmEngineConfig
from engine.vllm_engine import VllmEngine
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, ImagePart, Message, Part, TextPart
from renderer.prompt import RenderedPrompt
from renderer.renderer import Renderer
from tests.checkpoints import CHECKPOINTS
from tests.faults.cluster import Deployed, RayCluster, ray_cluster
from tests.vllm.published import published

# vLLM's own modules warn; what Greenroom's code warns of is an error all the same.
IGNORED = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PICTURE = (168, 112)
THREE_PICTURES = int(3.4 * 96 * 1176 / 0.9)

# The application of the tests on Ray Serve, but for its engines. The demo model's answers are known.
SERVED = {
    "model": "demo/model",
    "max_model_len": 2048,
    "renderer": {"media_threads": 1, "render_threads": 2},
    "router": {"failover_s": 300},
    "render": None,
}
STORY: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/vllm" in str(item.path):
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(1200))
            for warning in (*IGNORED, "ignore::pytest.PytestUnraisableExceptionWarning"):
                item.add_marker(pytest.mark.filterwarnings(warning))


@dataclass(frozen=True)
class Rig:
    """A renderer and the vLLM beside it."""

    renderer: Renderer
    engine: VllmEngine

    async def render(self, text: str, *pictures: int) -> RenderedPrompt:
        prompt: RenderedPrompt = await self.renderer.request_pool.run(self.renderer.render_chat, chat(text, *pictures))
        return prompt

    async def ask(
        self, prompt: RenderedPrompt, params: SamplingParams, request_id: str = "r", prior: tuple[int, ...] = ()
    ) -> list[EngineOutput]:
        outputs = self.engine.generate(prompt, params, request_id=request_id, prior_output_ids=prior)
        return [output async for output in outputs]


class Served(Deployed):
    """An application whose engines are vLLMs, which take their time."""

    start_s = 1200


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["qwen2_5_vl"])
async def rig(request: Any) -> AsyncIterator[Rig]:
    async for opened in open_rig(request.param):
        yield opened


async def open_rig(family: str) -> AsyncGenerator[Rig]:
    path, length = str(published(family)), min(8192, CHECKPOINTS[family].max_length)
    engine = VllmEngine(
        VllmEngineConfig(
            backend="vllm",
            model=path,
            dtype="float32",
            max_model_len=length,
            max_num_seqs=16,
            max_num_batched_tokens=4096,
            kv_cache_bytes=256 * 1024 * 1024,
            mm_cache_bytes=THREE_PICTURES,
            enforce_eager=True,
        )
    )
    renderer = Renderer(RendererConfig(model=path, max_model_len=length), engine.sender_cache)
    try:
        await engine.start()
        yield Rig(renderer, engine)
    finally:
        renderer.close()
        await engine.close()


def picture(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(PICTURE, Image.Resampling.NEAREST)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def chat(text: str, *pictures: int) -> ChatRequest:
    parts: tuple[Part, ...] = (*(ImagePart(png(seed)) for seed in pictures), TextPart(text))
    return ChatRequest((Message("user", parts),))


async def own_answer(rig: Rig, text: str, *pictures: int) -> tuple[int, ...]:
    """Greedy tokens that vLLM answers to a chat by itself: its own template, processor and hashes."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    llm = rig.engine._serving().llm
    tokenizer = llm.get_tokenizer()
    chat_text = _chat_text(rig, tokenizer, text, len(pictures))
    # As vLLM's chat route does it: the template writes the special tokens that there are.
    prompt: dict[str, Any] = {"prompt_token_ids": tokenizer.encode(chat_text, add_special_tokens=False)}
    if pictures:
        prompt["multi_modal_data"] = {"image": [picture(seed) for seed in pictures]}
    params = vllm.SamplingParams(
        max_tokens=GREEDY.max_tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    async for output in llm.generate(prompt, params, "own"):
        last = output
    return tuple(last.outputs[0].token_ids)


def _chat_text(rig: Rig, tokenizer: Any, text: str, pictures: int) -> str:
    if tokenizer.chat_template is None:
        return text  # vLLM then puts the messages' texts one after the other
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content if rig.renderer.modalities else text}]
    chat_text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return chat_text


def kill_core() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # as are those that have ended and nobody has waited for
            if "EngineCore" in " ".join(process.cmdline()):
                process.kill()


async def until_restarted(rig: Rig, restarts: int) -> None:
    """Wait until vLLM has been started again so often."""
    async with asyncio.timeout(600):
        while (await rig.engine.stats()).restarts < restarts:  # noqa: ASYNC110  # the engine tells nobody
            await asyncio.sleep(0.1)


def ids_of(outputs: list[EngineOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)

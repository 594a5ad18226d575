"""Every family that the CPU build of vLLM runs: our prompts are answered as vLLM answers the chat by itself."""

from __future__ import annotations

from contextlib import aclosing

import pytest

from tests.checkpoints import CHECKPOINTS
from tests.vllm.conftest import GREEDY, ids_of, open_rig, own_answer

ONE_PICTURE_AT_MOST = {"paligemma"}


@pytest.mark.parametrize("family", [family for family in CHECKPOINTS if family != "qwen2_5_vl"])  # test_vllm_engine.py
async def test_tokens_are_those_of_vllms_own_chat(family: str) -> None:
    async with aclosing(open_rig(family)) as rigs:
        rig = await anext(rigs)
        for pictures in _asked(family, bool(rig.renderer.modalities)):
            ours = ids_of(await rig.ask(await rig.render("What is it?", *pictures), GREEDY))
            assert len(ours) == GREEDY.max_tokens
            await rig.engine.reset_cache()
            assert await own_answer(rig, "What is it?", *pictures) == ours
            await rig.engine.reset_cache()


def _asked(family: str, takes_images: bool) -> tuple[tuple[int, ...], ...]:
    if not takes_images:
        return ((),)
    return ((), (1,)) if family in ONE_PICTURE_AT_MOST else ((), (1,), (2, 3))

"""Every family that the CPU build of vLLM runs: our prompts are answered as vLLM answers the chat by itself."""

from __future__ import annotations

from contextlib import aclosing

import pytest

from tests.vllm.conftest import GREEDY, ids_of, open_rig, own_answer


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "qwen3_vl", "idefics3", "internvl"])
async def test_tokens_are_those_of_vllms_own_chat(family: str) -> None:
    async with aclosing(open_rig(family)) as rigs:
        rig = await anext(rigs)
        for pictures in ((), (1,), (2, 3)) if rig.renderer.modalities else ((),):
            ours = ids_of(await rig.ask(await rig.render("What is it?", *pictures), GREEDY))
            assert len(ours) == GREEDY.max_tokens
            await rig.engine.reset_cache()
            assert await own_answer(rig, "What is it?", *pictures) == ours
            await rig.engine.reset_cache()

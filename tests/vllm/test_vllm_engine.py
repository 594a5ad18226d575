"""VllmEngine on the CPU build of vLLM: answers, cache coupling, continuation, death."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.protocol import EngineOutput, SamplingParams
from engine.vllm_adapter import vllm_params
from renderer.errors import CacheMissError, ContextLengthError, EngineDeadError, RequestError
from renderer.prompt import RenderedPrompt
from tests.engine.builders import EVERY_PARAMETER, with_other_weights
from tests.vllm.conftest import GREEDY, Rig, chat, ids_of, kill_core, own_answer, until_restarted

pytestmark = pytest.mark.asyncio(loop_scope="module")

_NORM = "model.norm.weight"
_ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"  # which older checkpoints hold, and nobody reads


@pytest.mark.parametrize("pictures", [(), (1,), (2, 3), (4, 4, 5)])
async def test_tokens_are_those_of_vllms_own_chat(rig: Rig, pictures: tuple[int, ...]) -> None:
    ours = ids_of(await rig.ask(await rig.render("What is it?", *pictures), GREEDY))
    assert len(ours) == GREEDY.max_tokens
    await rig.engine.reset_cache()  # nothing of ours may answer for it
    assert await own_answer(rig, "What is it?", *pictures) == ours
    await rig.engine.reset_cache()  # vLLM has put items of its own into the receiver


async def test_the_second_time_a_picture_crosses_by_reference(rig: Rig) -> None:
    first = ids_of(await rig.ask(await rig.render("What is it?", 7), GREEDY))
    before = (await rig.engine.stats()).tensors_received
    prompt = await rig.render("What is it?", 7)
    assert prompt.items[0].tensors is None
    assert ids_of(await rig.ask(prompt, GREEDY)) == first
    assert (await rig.engine.stats()).tensors_received == before


async def test_a_miss_that_comes_all_the_same_is_sent_again_and_counted(rig: Rig) -> None:
    prompt = await rig.render("What is it?", 60)
    whole = await rig.renderer.request_pool.run(rig.renderer.render_chat, chat("What is it?", 60), True)
    first = ids_of(await rig.ask(prompt, GREEDY))
    before = (await rig.engine.stats()).receiver_misses
    await rig.engine._serving().clear_caches()  # behind the mirror's back
    assert ids_of(await rig.ask(whole, GREEDY)) == first
    assert (await rig.engine.stats()).receiver_misses == before + 1
    await rig.engine._serving().clear_caches()
    with pytest.raises(CacheMissError):
        await rig.ask(replace(prompt, items=tuple(replace(item, tensors=None) for item in prompt.items)), GREEDY)
    await rig.engine.reset_cache()


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        replace(GREEDY, temperature=1.0, seed=5),
        replace(GREEDY, presence_penalty=1.0),
        replace(GREEDY, temperature=1.0, seed=5, frequency_penalty=0.5),
    ],
)
async def test_output_goes_on_after_what_another_replica_streamed(rig: Rig, params: SamplingParams) -> None:
    whole = ids_of(await rig.ask(await rig.render("Go on", 8), params))
    rest = await rig.ask(await rig.render("Go on", 8), params, prior=whole[:5])
    assert ids_of(rest) == whole[5:]
    assert rest[-1].finish_reason == "length"


async def test_an_item_that_the_model_does_not_take_is_refused_and_costs_nobody_else_anything(rig: Rig) -> None:
    prompt = await rig.renderer.request_pool.run(rig.renderer.render_chat, chat("What?", 9), True)
    item = prompt.items[0]
    tensors = dict(item.tensors or {})
    pixels = tensors["pixel_values"]
    for wrong in (
        {"pixel_values": pixels.astype(np.float32)},
        {"pixel_values": pixels[:-4]},
        {"pixel_values": pixels[:, :-1]},
        {"image_grid_thw": np.array([1, 2, 2])},
        {"more": pixels},
    ):
        bad = replace(item, cache_key="foreign:x", tensors={**tensors, **wrong})
        with pytest.raises(RequestError):
            await rig.ask(replace(prompt, items=(bad,)), GREEDY)
    await rig.engine.health()
    assert len(ids_of(await rig.ask(await rig.render("What?", 9), GREEDY))) == GREEDY.max_tokens


async def test_what_exceeds_the_length_is_refused(rig: Rig) -> None:
    with pytest.raises(ContextLengthError):
        await rig.ask(await rig.render("What?"), replace(GREEDY, max_tokens=8192))


async def test_logprobs_are_those_of_the_sampled_token_and_the_likeliest(rig: Rig) -> None:
    outputs = await rig.ask(await rig.render("What?"), replace(GREEDY, logprobs=3))
    entries = [entry for output in outputs for entry in output.logprobs]
    assert [entry.token_id for entry in entries] == list(ids_of(outputs))
    assert all(entry.rank == 1 and entry.top[0] == (entry.token_id, entry.logprob) for entry in entries)
    assert all(len(entry.top) == 3 for entry in entries)


async def test_every_parameter_is_told_by_its_name() -> None:
    told = vllm_params(EVERY_PARAMETER)
    for field in fields(SamplingParams):
        value = getattr(EVERY_PARAMETER, field.name)
        if field.name == "structured":
            assert told.structured_outputs.json == value
        else:
            assert getattr(told, field.name) == (list(value) if isinstance(value, tuple) else value), field.name


async def test_parameters_do_what_they_say(rig: Rig) -> None:
    async def ask(**changes: Any) -> tuple[tuple[int, ...], EngineOutput]:
        outputs = await rig.ask(await rig.render("What is it?", 1), replace(GREEDY, **changes))
        return ids_of(outputs), outputs[-1]

    greedy, end = await ask()
    assert (len(greedy), end.finish_reason) == (GREEDY.max_tokens, "length")
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert (await ask(temperature=1.0, seed=3, **cut))[0] == greedy, cut
    random, again = [(await ask(temperature=1.0, seed=3))[0] for _ in range(2)]
    assert random == again != greedy
    stop = greedy[4]
    cut_off, end = await ask(stop_token_ids=(stop,))
    assert cut_off == greedy[: greedy.index(stop) + 1]
    assert (end.finish_reason, end.stop_reason) == ("stop", stop)
    held, _ = await ask(stop_token_ids=(stop,), min_tokens=10)
    assert len(held) >= 10
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 2.0}):
        assert (await ask(**penalty))[0] != greedy, penalty


async def test_a_schema_is_followed(rig: Rig) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    outputs = await rig.ask(
        await rig.render("Number?"), SamplingParams(max_tokens=40, temperature=1.0, seed=1, structured=schema)
    )
    assert rig.renderer.detokenize(ids_of(outputs)).startswith(('{"n":1}', '{"n":22}'))
    assert outputs[-1].finish_reason == "stop"


async def test_an_aborted_request_ends_with_that_reason(rig: Rig) -> None:
    prompt = await rig.render("Long")
    outputs = rig.engine.generate(prompt, replace(GREEDY, max_tokens=3000), request_id="long")
    reasons = []
    async for output in outputs:
        reasons.append(output.finish_reason)
        if len(reasons) == 1:
            await rig.engine.abort("long")
    assert reasons[-1] == "abort"
    assert (await rig.engine.stats()).aborted > 0


async def test_an_abort_before_a_request_is_sent_is_not_lost(rig: Rig) -> None:
    sent = (await rig.engine.stats()).tensors_received
    async with rig.engine._order:  # as while another is sent
        asked = asyncio.create_task(rig.ask(await rig.render("Long", 61), GREEDY, request_id="early"))
        while not rig.engine._relay.requests._by_id:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await rig.engine.abort("early")
        assert [output.finish_reason for output in await asked] == ["abort"]
    stats = await rig.engine.stats()
    assert (stats.tensors_received, stats.running + stats.waiting) == (sent, 0)
    assert not rig.engine._relay.requests._by_id


async def test_other_weights_are_taken_and_given_back(rig: Rig, tmp_path: Path) -> None:
    asked = [("What is it?", 1), ("What is it?", 2), ("Where?", 1)]

    async def answers() -> list[tuple[int, ...]]:
        return [ids_of(await rig.ask(await rig.render(text, seed), GREEDY)) for text, seed in asked]

    own = await answers()
    others = with_other_weights(Path(rig.engine.config.model), tmp_path / "others")
    _changed(others, others, lambda weights: weights.update({_ROTARY: torch.ones(16)}))
    await rig.engine.reload(str(others))
    sent = (await rig.engine.stats()).tensors_received
    changed = await answers()
    assert all(other != ours for other, ours in zip(changed, own, strict=True))
    assert (await rig.engine.stats()).tensors_received == sent  # pictures do not depend on weights
    await rig.engine.reload(None)
    assert await answers() == own
    with pytest.raises(RequestError):
        await rig.engine.reload("/nowhere")


async def test_weights_that_vllm_cannot_take_whole_are_refused_and_change_nothing(rig: Rig, tmp_path: Path) -> None:
    own = ids_of(await rig.ask(await rig.render("What is it?", 1), GREEDY))
    others = with_other_weights(Path(rig.engine.config.model), tmp_path / "others")
    changes = (
        lambda weights: weights.pop(_NORM),
        lambda weights: weights.update({_NORM: weights[_NORM][:-1]}),
        lambda weights: weights.update({f"{_NORM}_more": weights[_NORM].clone()}),
    )
    for change in changes:
        with pytest.raises(RequestError, match=r"model\.norm"):
            await rig.engine.reload(str(_changed(others, tmp_path / "unfit", change)))
    assert ids_of(await rig.ask(await rig.render("What is it?", 1), GREEDY)) == own


async def test_after_a_reload_that_failed_half_way_vllm_comes_back_with_the_weights_before(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarts = (await rig.engine.stats()).restarts
    others = with_other_weights(Path(rig.engine.config.model), tmp_path / "others")
    await rig.engine.reload(str(others))
    right = ids_of(await rig.ask(await rig.render("What is it?", 1), GREEDY))
    unfit = _changed(Path(rig.engine.config.model), tmp_path / "unfit", lambda weights: weights.pop(_NORM))
    (unfit / "model.safetensors").write_bytes((unfit / "model.safetensors").read_bytes()[:-64])
    with monkeypatch.context() as patch:
        patch.setattr("engine.vllm_engine.check_weights", lambda *_: None)
        with pytest.raises(EngineDeadError):
            await rig.engine.reload(str(unfit))
    with pytest.raises(EngineDeadError):
        await rig.engine.health()
    await until_restarted(rig, restarts + 1)
    assert ids_of(await rig.ask(await rig.render("What is it?", 1), GREEDY)) == right
    await rig.engine.reload(None)


async def test_a_dead_core_ends_its_requests_and_comes_back_empty(rig: Rig) -> None:
    restarts = (await rig.engine.stats()).restarts
    answer = ids_of(await rig.ask(await rig.render("What is it?", 1), GREEDY))
    prompt = await rig.render("Long")
    with pytest.raises(EngineDeadError):
        await _killed_while_streaming(rig, prompt)
    with pytest.raises(EngineDeadError):
        await rig.engine.health()
    await until_restarted(rig, restarts + 1)
    assert rig.engine.sender_cache.keys() == ()
    again = await rig.render("What is it?", 1)
    assert again.items[0].tensors is not None
    assert ids_of(await rig.ask(again, GREEDY)) == answer


async def _killed_while_streaming(rig: Rig, prompt: RenderedPrompt) -> None:
    async for _ in rig.engine.generate(prompt, replace(GREEDY, max_tokens=3000), request_id="long"):
        kill_core()


def _changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint, its weights changed."""
    if folder != source:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder

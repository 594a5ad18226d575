"""Steps seen one by one: who computes what, what is shared, what comes back, and what a failure costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch

from engine.messages import Abort
from engine.protocol import SamplingParams
from engine.worker import Worker
from renderer.errors import EngineError
from renderer.prompt import Tensors
from tests.checkpoints import checkpoint
from tests.engine.builders import GREEDY, Picture, Rig, Text, engine_config, lab

FAMILY = "qwen2_5_vl"
BLOCK = 8


def rig_of(**changes: object) -> Rig:
    return Rig(Worker(engine_config(checkpoint(FAMILY), **changes)))


@pytest.fixture(scope="module")
def shared_rig() -> Rig:
    """For tests that leave nothing behind but prefixes of their own salt."""
    return rig_of()


def decode_for(tokens: int) -> SamplingParams:
    return dataclasses.replace(GREEDY, max_tokens=tokens)


def test_a_long_prefill_does_not_stop_others_from_decoding() -> None:
    rig = rig_of(max_num_batched_tokens=32)
    decoding = rig.submit(lab(FAMILY).prompt(Text(5)), decode_for(50))
    rig.step()
    prefilling = rig.submit(lab(FAMILY).prompt(Text(320, 1)))
    steps = 0
    while not rig.tokens[prefilling]:
        rig.step()
        steps += 1
        assert len(rig.tokens[decoding]) == 1 + steps
    assert steps == -(-320 // 31)


def test_a_step_computes_no_more_tokens_than_its_budget() -> None:
    rig = rig_of(max_num_batched_tokens=16, max_num_seqs=16)
    for index in range(20):
        rig.submit(lab(FAMILY).prompt(Text(40, index)), decode_for(4))
    widest = 0
    while rig.worker.scheduler.has_work:
        before = {request.key: request.computed for request in rig.worker.requests.values()}
        rig.step()
        after = rig.worker.requests.values()
        computed = [request.computed - max(before[request.key], request.cached) for request in after]
        assert sum(computed) <= 16
        widest = max(widest, rig.worker.stats.running)
    assert len(rig.ends) == 20
    assert widest <= 16


def test_all_that_a_step_brings_crosses_in_one_message(shared_rig: Rig) -> None:
    keys = [shared_rig.submit(lab(FAMILY).prompt(Text(5, 130 + number)), decode_for(3)) for number in range(4)]
    for _ in range(3):
        shared_rig.worker.step()
        news = shared_rig.worker.drain()
        assert news is not None
        assert [key for key, _ in news.outputs] == keys
        assert shared_rig.worker.drain() is None


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    rig = rig_of()
    prompt = lab(FAMILY).prompt(Text(41, 3), Picture(3))
    answers = rig.answers(prompt, prompt, prompt)
    assert set(answers) == {lab(FAMILY).alone(prompt, GREEDY.max_tokens)}
    stats = rig.worker.stats
    assert stats.encoder_runs == 1
    assert stats.cached_tokens == 2 * ((len(prompt.token_ids) - 1) // BLOCK * BLOCK)


def test_a_chunk_that_begins_inside_a_picture_after_a_prefix_hit_is_right() -> None:
    rig = rig_of()
    prompt = lab(FAMILY).prompt(Text(5, 4), Picture(4, 168, 168))
    (item,) = prompt.items
    first = rig.answers(prompt)
    rig.worker.encoder_cache.clear()
    assert rig.answers(prompt) == first == [lab(FAMILY).alone(prompt, GREEDY.max_tokens)]
    assert item.range.offset < rig.worker.stats.cached_tokens < item.range.end
    assert rig.worker.stats.encoder_runs == 2


def test_equal_text_with_different_pictures_never_shares() -> None:
    rig = rig_of()
    prompts = [lab(FAMILY).prompt(Text(16, 6), Picture(seed), Text(3, 7)) for seed in (1, 2)]
    assert prompts[0].token_ids == prompts[1].token_ids
    answers = [rig.answers(prompt)[0] for prompt in prompts]
    assert rig.worker.stats.cached_tokens == 16  # the text before the picture, and no more
    assert answers == [lab(FAMILY).alone(prompt, GREEDY.max_tokens) for prompt in prompts]
    assert answers[0] != answers[1]


def test_equal_prompts_under_different_salts_never_share() -> None:
    rig = rig_of()
    for salt in (None, "a", "b"):
        rig.answers(lab(FAMILY).prompt(Text(50, 8), Picture(8), salt=salt))
    assert rig.worker.stats.cached_tokens == 0
    rig.answers(lab(FAMILY).prompt(Text(50, 8), Picture(8), salt="b"))
    assert rig.worker.stats.cached_tokens == 48


def test_more_requests_than_blocks_all_get_their_turn_in_order() -> None:
    rig = rig_of(kv_cache_bytes=60 * BLOCK * 2 * 2 * 1 * 32 * 4, max_model_len=400)
    prompts = [lab(FAMILY).prompt(Text(100, index)) for index in range(10)]
    keys = [rig.submit(prompt, decode_for(60)) for prompt in prompts]
    most = 0
    while rig.worker.scheduler.has_work:
        rig.step()
        most = max(most, rig.worker.stats.running)
    assert most == 2  # twenty blocks each
    assert [rig.ends[key].finish_reason for key in keys] == ["length"] * 10
    assert list(rig.ends) == keys
    assert tuple(rig.tokens[keys[9]]) == lab(FAMILY).alone(prompts[9], 60)


def test_nothing_is_left_of_a_thousand_requests(shared_rig: Rig) -> None:
    worker = shared_rig.worker
    before = worker.stats
    for round_ in range(50):
        for index in range(20):
            prompt = lab(FAMILY).prompt(Text(2 + index, 1000 + round_), *([Picture(index % 5)] * (index % 2)))
            shared_rig.submit(prompt, decode_for(1 + index % 3))
        shared_rig.run()
    after = worker.stats
    assert after.requests - before.requests == 1000
    assert (after.running, after.waiting, after.blocks_used) == (0, 0, 0)
    assert worker.requests == {}
    assert worker.pool.available == worker.pool.num_blocks
    assert len(worker.pool._block_of) <= worker.pool.num_blocks
    assert worker.encoder_cache.bytes <= worker.config.encoder_cache_bytes


def test_abort_frees_what_a_request_holds_wherever_it_stands() -> None:
    rig = rig_of(max_num_batched_tokens=16, max_num_seqs=2)
    prompts = [lab(FAMILY).prompt(Text(60, 90 + index), Picture(9)) for index in range(4)]
    decoding, prefilling, waiting, last = (rig.submit(prompt, decode_for(20)) for prompt in prompts)
    while not rig.tokens[decoding]:
        rig.step()
    assert rig.worker.stats.waiting == 2
    for key in (decoding, prefilling, waiting, 999):
        rig.worker.handle(Abort((key,), silent=False))
        rig.collect()
    assert [rig.ends[key].finish_reason for key in (decoding, prefilling, waiting)] == ["abort"] * 3
    assert rig.worker.stats.blocks_used == 0
    assert rig.worker.stats.aborted == 3
    rig.run()
    assert tuple(rig.tokens[last]) == lab(FAMILY).alone(prompts[3], 20)


def test_an_item_that_cannot_be_encoded_ends_only_the_requests_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rig_of()
    encode = rig.worker.model.encode
    poison = lab(FAMILY).prompt(Text(40, 20), Picture(66, 84, 84))
    (bad,) = poison.items

    def fail(items: Sequence[Tensors]) -> list[torch.Tensor]:
        if any(item is bad.tensors for item in items):
            raise RuntimeError("the encoder cannot")
        return encode(items)

    monkeypatch.setattr(rig.worker.model, "encode", fail)
    running = lab(FAMILY).prompt(Text(9, 21))
    good = [lab(FAMILY).prompt(Text(40, 20), Picture(67)), lab(FAMILY).prompt(Text(40, 20))]
    first = rig.submit(running, decode_for(12))
    rig.step()
    keys = [rig.submit(prompt) for prompt in (poison, *good, poison)]
    rig.run()
    assert set(rig.failures) == {keys[0], keys[3]}
    assert all(type(error) is EngineError for error in rig.failures.values())
    assert tuple(rig.tokens[first]) == lab(FAMILY).alone(running, 12)
    right = [lab(FAMILY).alone(prompt, GREEDY.max_tokens) for prompt in good]
    assert [tuple(rig.tokens[key]) for key in keys[1:3]] == right
    assert rig.answers(*good) == right
    assert rig.worker.stats.blocks_used == 0


def test_an_item_that_the_receiver_lacks_is_counted_and_ends_its_request_alone(shared_rig: Rig) -> None:
    prompt = lab(FAMILY).prompt(Text(4, 70), Picture(70), salt="miss")
    absent = shared_rig.submit(dataclasses.replace(prompt, items=(dataclasses.replace(prompt.items[0], tensors=None),)))
    other = shared_rig.submit(prompt)
    shared_rig.run()
    assert isinstance(shared_rig.failures[absent], EngineError)
    assert tuple(shared_rig.tokens[other]) == lab(FAMILY).alone(prompt, GREEDY.max_tokens)
    assert shared_rig.worker.stats.receiver_misses == 1


def test_embeddings_that_are_no_numbers_reach_no_blocks() -> None:
    """In a block they would spread, through the mask, to the next request that gets it."""
    rig = rig_of()
    sick = lab(FAMILY).prompt(Text(4), Picture(3), Text(4, 1))
    tensors = {name: tensor.copy() for name, tensor in (sick.items[0].tensors or {}).items()}
    tensors["pixel_values"].reshape(-1)[0] = float("nan")
    sick = dataclasses.replace(sick, items=(dataclasses.replace(sick.items[0], tensors=tensors),))
    others = [lab(FAMILY).prompt(Text(9, seed)) for seed in range(3)]
    keys = [rig.submit(prompt) for prompt in (sick, *others)]
    rig.run()
    assert isinstance(rig.failures[keys[0]], EngineError)
    assert [tuple(rig.tokens[key]) for key in keys[1:]] == [lab(FAMILY).alone(prompt, 10) for prompt in others]
    assert rig.worker.stats.blocks_used == 0


def test_a_step_that_fails_ends_its_requests_and_leaves_no_false_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rig_of()
    prompt = lab(FAMILY).prompt(Text(50, 30))

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(rig.worker.model, "forward", fail)
        key = rig.submit(prompt)
        rig.step()
    assert type(rig.failures[key]) is EngineError
    assert rig.answers(prompt) == [lab(FAMILY).alone(prompt, GREEDY.max_tokens)]
    assert rig.worker.stats.cached_tokens == 0


def test_many_large_pictures_are_encoded_over_several_steps() -> None:
    """A step encodes no more embeddings than its budget has tokens, but always one item."""
    rig = rig_of(max_num_batched_tokens=32)
    prompt = lab(FAMILY).prompt(*(Picture(seed, 168, 168) for seed in range(4)), Text(3))
    decoding = rig.submit(lab(FAMILY).prompt(Text(4, 5)), decode_for(30))
    rig.step()
    key = rig.submit(prompt)
    runs = [rig.worker.stats.encoder_runs]
    while not rig.tokens[key]:
        rig.step()
        runs.append(rig.worker.stats.encoder_runs)
    assert max(later - earlier for earlier, later in itertools.pairwise(runs)) == 1
    assert len(rig.tokens[decoding]) == len(runs)
    rig.run()
    assert tuple(rig.tokens[key]) == lab(FAMILY).alone(prompt, GREEDY.max_tokens)


def test_a_prompts_last_token_waits_for_its_picture_however_few_are_left_to_compute() -> None:
    rig = rig_of(max_num_batched_tokens=48)
    whole = lab(FAMILY).prompt(Text(5, 9), Picture(9, 168, 168))
    prompt = dataclasses.replace(whole, token_ids=whole.token_ids[:-1])  # it ends with the picture
    assert prompt.items[0].range.end == len(prompt.token_ids) == 5 * BLOCK + 1
    first = rig.answers(prompt)
    rig.worker.encoder_cache.clear()
    other = rig.submit(lab(FAMILY).prompt(Text(3, 10), Picture(10, 168, 168)))  # takes the step's embeddings
    again = rig.submit(prompt)
    rig.step()
    assert rig.worker.requests[again].computed == 5 * BLOCK
    rig.run()
    assert not rig.failures
    assert [tuple(rig.tokens[again])] == first
    assert len(rig.tokens[other]) == GREEDY.max_tokens


def test_prior_output_that_has_ended_gives_an_end_and_no_token(shared_rig: Rig) -> None:
    prompt = lab(FAMILY).prompt(Text(5, 40))
    params = SamplingParams(max_tokens=3, temperature=0.0, stop_token_ids=(21,))
    ends = {}
    for name, prior in {"length": (30, 31, 32), "over": (30, 31, 32, 33), "stop": (30, 21)}.items():
        ends[name] = shared_rig.ends[shared_rig.submit(prompt, params, prior)]
    assert [(end.token_ids, end.finish_reason, end.stop_reason) for end in ends.values()] == [
        ((), "length", None),
        ((), "length", None),
        ((), "stop", 21),
    ]


def test_ends_are_reported_with_their_reason(shared_rig: Rig) -> None:
    prompt = lab(FAMILY).prompt(Text(5, 41))
    tokens = lab(FAMILY).alone(prompt, 10)
    third = tokens[2]
    first_at = tokens.index(third) + 1
    stopping = dataclasses.replace(GREEDY, stop_token_ids=(third,))
    key = shared_rig.submit(prompt, stopping)
    late = shared_rig.submit(prompt, dataclasses.replace(stopping, min_tokens=8))
    shared_rig.run()
    assert shared_rig.tokens[key] == list(tokens[:first_at])
    assert (shared_rig.ends[key].finish_reason, shared_rig.ends[key].stop_reason) == ("stop", third)
    assert len(shared_rig.tokens[late]) >= 8
    assert third not in shared_rig.tokens[late][:8]


def test_the_models_own_end_of_sequence_ends_unless_ignored() -> None:
    rig = rig_of()
    prompt = lab(FAMILY).prompt(Text(5, 42))
    tokens = lab(FAMILY).alone(prompt, 10)
    rig.worker.model.eos_ids = frozenset({tokens[4]})
    ended = rig.submit(prompt, dataclasses.replace(GREEDY, ignore_eos=False))
    ignored = rig.submit(prompt, GREEDY)
    rig.run()
    assert rig.tokens[ended] == list(tokens[: tokens.index(tokens[4]) + 1])
    assert (rig.ends[ended].finish_reason, rig.ends[ended].stop_reason) == ("stop", None)
    assert rig.tokens[ignored] == list(tokens)

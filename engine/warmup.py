"""Work like that to come, done before the core says that it is ready."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from engine.messages import Submit
from engine.protocol import SamplingParams
from engine.worker import Worker
from renderer.caches import Submission, SubmittedItem
from renderer.errors import WarmupError
from renderer.prompt import PlaceholderRange

_USUAL_ITEM = 256  # embeddings: a picture of about 450 by 450 pixels, where the model cuts patches of 14
_DECODE_STEPS = 3


def warm_up(worker: Worker) -> dict[str, float]:
    """Encode, prefill and decode at several sizes; nothing is left behind.

    Returns:
        Seconds by step.

    Raises:
        WarmupError: A request of the warm-up failed.
    """
    seconds = {}
    if worker.model.device.type == "cuda":
        started = time.perf_counter()
        worker.model.capture_graphs(worker.config.max_num_seqs, worker.admission.max_model_len)
        seconds["decode_graphs"] = time.perf_counter() - started
    for name, requests in _plan(worker):
        started = time.perf_counter()
        _run(worker, name, requests)
        seconds[name] = time.perf_counter() - started
        worker.reset_cache(())
    worker.reset_counters()
    return seconds


def _plan(worker: Worker) -> Iterator[tuple[str, list[Submit]]]:
    longest = worker.admission.max_model_len
    largest = worker.model.family.largest_item
    if largest:
        yield "encoder_largest", [_picture(worker, largest)]
        yield "encoder_usual", [_picture(worker, min(largest, _USUAL_ITEM))]
    yield "prefill", [_text(0, min(longest - 1, worker.scheduler.budget), 1)]
    count = 1
    while count <= worker.config.max_num_seqs:
        yield f"decode_{count}", [_text(key, min(longest - _DECODE_STEPS, 16), _DECODE_STEPS) for key in range(count)]
        count *= 2


def _text(key: int, tokens: int, output: int) -> Submit:
    return _submit(key, max(1, tokens), output, (), Submission((), ()))


def _picture(worker: Worker, embeds: int) -> Submit:
    """A picture of at most so many embeddings that fits beside one token of text and one of output."""
    tensors = worker.model.family.example(min(embeds, worker.admission.max_model_len - 2))
    count = worker.model.family.check(tensors)
    item = SubmittedItem("warm-up", tensors, keep=False)
    return _submit(0, count + 1, 1, (PlaceholderRange(0, count),), Submission((), (item,)))


def _submit(key: int, tokens: int, output: int, ranges: tuple[PlaceholderRange, ...], submission: Submission) -> Submit:
    ids = np.zeros(tokens, dtype=np.int32)
    params = SamplingParams(max_tokens=output, temperature=1.0, top_p=0.9, seed=0, ignore_eos=True)
    return Submit(key, ids, ranges, submission, params, np.zeros(0, dtype=np.int32), cache_salt=str(key))


def _run(worker: Worker, name: str, requests: list[Submit]) -> None:
    for request in requests:
        worker.handle(request)
    while worker.scheduler.has_work:
        worker.step()
    outputs = worker.drain()
    if outputs is None or outputs.failures:
        reasons = {str(error) for _, error in outputs.failures} if outputs else {"no output"}
        raise WarmupError(f"the engine's warm-up step {name} failed: {'; '.join(sorted(reasons))}")

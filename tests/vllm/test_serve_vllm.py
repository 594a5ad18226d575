"""The application on Ray Serve with two engine replicas whose engine is a vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psutil
import pytest

from tests.faults.cluster import Deployed, RayCluster, kill
from tests.stack.helpers import ITEM_BYTES, about, picture, streams_with_a_death, wait_until
from tests.vllm.conftest import SERVED, STORY, Served

REPLICAS = 2
VLLM = {
    "backend": "vllm",
    "dtype": "float32",
    "max_num_seqs": 16,
    "kv_cache_bytes": 64 * 2**20,
    "mm_cache_bytes": 4 * ITEM_BYTES,
    "enforce_eager": True,
}


@pytest.fixture(scope="module")
def app(cluster: RayCluster) -> Iterator[Deployed]:
    engines = {"num_replicas": REPLICAS, "autoscaling_config": None}
    app = Served("vllm", cluster, {**SERVED, "engine": {"engine": VLLM}}, EngineReplica=engines)
    app.wait_for_replicas(EngineReplica=REPLICAS)
    yield app
    app.close()


def total(app: Deployed, name: str) -> int:
    """A counter of all engines together."""
    return sum(getattr(report.engine, name) for report in app.tiers()["engine"])


def core_of(app: Deployed) -> psutil.Process:
    """The engine core of the vLLM that has requests."""
    (busy,) = (report for report in app.tiers()["engine"] if report.engine is not None and report.engine.running)
    children = psutil.Process(busy.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


def test_a_question_about_a_picture_is_answered_and_asked_again_it_crosses_by_reference(app: Deployed) -> None:
    for number in range(4):
        body = {"messages": about(picture(number)), "temperature": 0}
        first = app.post("/v1/chat/completions", body)
        assert picture(number).color in first.json()["choices"][0]["message"]["content"]
        sent = total(app, "tensors_received")
        again = app.post("/v1/chat/completions", body)
        assert again.headers["X-Greenroom-Replica"] == first.headers["X-Greenroom-Replica"]
        assert again.json()["choices"] == first.json()["choices"]
        assert total(app, "tensors_received") == sent
    assert total(app, "receiver_misses") == 0


def test_a_stream_says_what_the_whole_answer_says(app: Deployed) -> None:
    answer = app.post("/v1/chat/completions", {**STORY, "max_tokens": 40}).json()
    chunks = app.openai().chat.completions.create(**STORY, model="", max_tokens=40, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer["choices"][0]["message"]["content"]


async def test_streams_go_on_at_the_other_replica_when_a_vllm_is_killed(app: Deployed) -> None:
    body = {**STORY, "messages": about(picture(5), text="Tell me a story."), "ignore_eos": True, "max_tokens": 400}
    undisturbed = (await asyncio.to_thread(app.post, "/v1/chat/completions", body)).json()
    restarts = await asyncio.to_thread(total, app, "restarts")
    texts = await streams_with_a_death(app, body, lambda: kill(core_of(app).pid))
    assert texts == [undisturbed["choices"][0]["message"]["content"]] * len(texts)
    back = lambda: total(app, "restarts") == restarts + 1  # noqa: E731
    await asyncio.to_thread(wait_until, back, Served.start_s, "vLLM was started again once")
    answer = await asyncio.to_thread(app.post, "/v1/chat/completions", body)
    assert answer.json()["choices"][0]["message"] == undisturbed["choices"][0]["message"]


def test_nothing_is_left_of_a_replica_that_is_killed(app: Deployed) -> None:
    replica = app.replicas("EngineReplica")[0]
    theirs = psutil.Process(replica.pid).children(recursive=True)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in theirs)
    kill(replica.pid)
    _, alive = psutil.wait_procs(theirs, timeout=30)
    assert alive == []
    answer = app.post("/v1/chat/completions", {"messages": about(picture(0)), "temperature": 0})
    assert picture(0).color in answer.json()["choices"][0]["message"]["content"]

"""The application on Ray Serve with two engine replicas whose engine is a vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.client import Client
from renderer.errors import RequestError
from tests.engine.builders import with_other_weights
from tests.faults.cluster import Deployed, RayCluster, kill
from tests.stack.helpers import ITEM_BYTES, about, picture, streams_with_a_death, wait_until
from tests.vllm.conftest import SERVED, STORY, Served

GENERATE = "/inference/v1/generate"
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


def test_token_in_token_out_is_answered_as_chat_is(app: Deployed) -> None:
    body = {"messages": about(picture(2), picture(5)), "temperature": 0, "max_tokens": 40}
    chat = app.post("/v1/chat/completions", body).json()
    prompt = app.post("/v1/chat/completions/render", body).json()
    answer = app.post(GENERATE, prompt | {"output_mode": "text", "return_token_ids": True}).json()
    assert answer["choices"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["prompt_token_ids"] == prompt["token_ids"]
    with app.http.stream("POST", GENERATE, json=prompt | {"stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    tokens = [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"]]
    assert tokens == answer["choices"][0]["token_ids"]


async def test_a_request_is_aborted_by_its_id(app: Deployed) -> None:
    body: dict[str, Any] = {"token_ids": [300, 301, 302], "request_id": "long", "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_tokens": 1800, "ignore_eos": True}
    reasons: list[str | None] = []
    async with (
        httpx.AsyncClient(base_url=app.url, timeout=300) as http,
        http.stream("POST", GENERATE, json=body) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                if not reasons:
                    answer = await http.post("/inference/v1/abort_requests", json={"request_ids": ["long"]})
                    assert answer.status_code == 200
                reasons.append(json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"])
    assert reasons[-1] == "abort"


async def test_weights_are_changed_while_generation_is_paused(app: Deployed, tmp_path: Path) -> None:
    client = Client(handle=app.handle)
    asked = [(300 + seed, 301, 302, 303) for seed in range(6)]  # for both replicas

    async def answers() -> list[tuple[tuple[int, ...], str]]:
        found = []
        for ids in asked:
            (choice,) = (await client.generate(ids, {"temperature": 0, "max_tokens": 12, "ignore_eos": True})).choices
            assert choice.weight_versions is not None
            found.append((choice.token_ids, choice.weight_versions[0]["version"]))
        return found

    before = await answers()
    other = with_other_weights(Path("demo/model"), tmp_path / "other")
    await client.pause()
    waiting = asyncio.create_task(client.generate(asked[0], {"temperature": 0, "max_tokens": 12, "ignore_eos": True}))
    (other / "model.safetensors").rename(other / "away")
    with pytest.raises(RequestError, match="safetensors"):
        await client.reload(str(other))
    (other / "away").rename(other / "model.safetensors")
    assert await client.reload(str(other), "step-1") == "step-1"
    assert not waiting.done()
    await client.resume()
    (choice,) = (await waiting).choices
    after = await answers()
    assert (choice.token_ids, "step-1") == after[0]
    assert {version for _, version in after} == {"step-1"}
    assert all(new[0] != old[0] for new, old in zip(after, before, strict=True))
    await client.pause("abort")
    await client.reload(None, "default")
    await client.resume()
    assert await answers() == before


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

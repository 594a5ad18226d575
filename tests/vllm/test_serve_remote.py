"""The application on Ray Serve whose engine is two vLLM servers elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.config import find_model
from tests.faults.cluster import Deployed, RayCluster
from tests.stack.helpers import about, picture, streams_with_a_death
from tests.vllm.conftest import SERVED, STORY, Served
from tests.vllm.servers import kill_server, tokens_made, two_servers


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, ...]]:
    with two_servers(Path(find_model(str(SERVED["model"])))) as urls:
        yield urls


@pytest.fixture(scope="module")
def app(cluster: RayCluster, servers: tuple[str, ...]) -> Iterator[Deployed]:
    engine = {"backend": "remote", "urls": servers, "dtype": "float32"}
    app = Served("remote", cluster, {**SERVED, "engine": {"engine": engine}})
    yield app
    app.close()


def test_a_question_about_a_picture_is_answered_and_nothing_of_it_is_kept_beside_the_router(app: Deployed) -> None:
    for number in range(4):
        body = {"messages": about(picture(number)), "temperature": 0}
        answer = app.post("/v1/chat/completions", body)
        assert picture(number).color in answer.json()["choices"][0]["message"]["content"]
        assert app.post("/v1/chat/completions", body).json()["choices"] == answer.json()["choices"]
    report = app.report("engine")
    assert report.engine is not None
    assert report.engine.tensors_received == 8  # the servers' caches are nobody's business here: all of it, every time
    assert "sender" not in report.caches
    assert report.caches["processor"].hits == 4


def test_a_stream_says_what_the_whole_answer_says(app: Deployed) -> None:
    answer = app.post("/v1/chat/completions", {**STORY, "max_tokens": 40}).json()
    chunks = app.openai().chat.completions.create(**STORY, model="", max_tokens=40, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer["choices"][0]["message"]["content"]


async def test_streams_go_on_at_the_other_server_when_one_is_killed(app: Deployed, servers: tuple[str, ...]) -> None:
    body = {**STORY, "messages": about(picture(5), text="Tell me a story."), "ignore_eos": True, "max_tokens": 400}
    undisturbed = app.post("/v1/chat/completions", body).json()
    texts = await streams_with_a_death(app, body, lambda: kill_server(servers[0]))
    assert texts == [undisturbed["choices"][0]["message"]["content"]] * len(texts)
    made = await tokens_made(servers[1])
    after = app.post("/v1/chat/completions", body).json()
    assert after["choices"][0]["message"] == undisturbed["choices"][0]["message"]
    assert await tokens_made(servers[1]) == made + 400

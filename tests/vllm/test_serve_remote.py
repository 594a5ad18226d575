"""The application on Ray Serve whose engine is two vLLM servers elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    told: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = app.openai().chat.completions.create(**STORY, **told, model="", max_tokens=40)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer["choices"][0]["message"]["content"]
    assert last.usage.prompt_tokens == answer["usage"]["prompt_tokens"]


def test_cached_tokens_in_a_streams_usage_are_what_the_servers_say(app: Deployed) -> None:
    asked: dict[str, Any] = {"messages": about(picture(3), text="What is it? " * 12), "temperature": 0, "max_tokens": 4}
    told: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    usages = []
    for _ in range(4):  # twice at either server
        *_, last = app.openai().chat.completions.create(**asked, **told, model="")
        usages.append(last.usage)
    assert usages[-1].prompt_tokens_details.cached_tokens > usages[-1].prompt_tokens // 2
    answer = app.post("/v1/chat/completions", asked).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == usages[-1].prompt_tokens_details.cached_tokens


async def test_streams_go_on_at_the_other_server_when_one_is_killed(app: Deployed, servers: tuple[str, ...]) -> None:
    body = {**STORY, "messages": about(picture(5), text="Tell me a story."), "ignore_eos": True, "max_tokens": 400}
    undisturbed = app.post("/v1/chat/completions", body).json()
    texts = await streams_with_a_death(app, body, lambda: kill_server(servers[0]))
    assert texts == [undisturbed["choices"][0]["message"]["content"]] * len(texts)
    made = await tokens_made(servers[1])
    after = app.post("/v1/chat/completions", body).json()
    assert after["choices"][0]["message"] == undisturbed["choices"][0]["message"]
    assert await tokens_made(servers[1]) == made + 400

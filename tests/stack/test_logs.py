"""One id finds a request in the lines of every process that it passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from tests.stack.helpers import Application, about, picture, wait_until

ID = "an-id-of-the-client"


@pytest.fixture(scope="module")
def answer(whole: Application) -> httpx.Response:
    body = {"messages": about(picture(52)), "max_tokens": 4}
    return whole.http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": ID})


def lines(request_id: str) -> list[dict[str, Any]]:
    """Every line of the cluster's log files about a request."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path(), "serve")
    texts = [line for path in folder.glob("*.log") for line in path.read_text().splitlines() if request_id in line]
    return [json.loads(text) for text in texts]


def test_the_clients_id_is_on_the_lines_of_proxy_router_and_engine_replica(answer: httpx.Response) -> None:
    assert answer.headers["x-request-id"] == ID
    wanted = {("proxy", None), ("replica", "greenroom_Router"), ("replica", "greenroom_EngineReplica")}

    def found() -> set[tuple[Any, Any]]:
        return {(line["component_name"], line.get("deployment")) for line in lines(ID) if line["request_id"] == ID}

    wait_until(lambda: found() >= wanted, 30, f"lines of {wanted}")


def test_the_engine_replicas_line_says_what_was_asked_and_how_long_its_stages_took(answer: httpx.Response) -> None:
    def begun() -> list[dict[str, Any]]:
        return [line for line in lines(ID) if line["message"].startswith("generation has begun")]

    wait_until(lambda: bool(begun()), 30, "the engine replica's line")
    (line,) = begun()
    assert (line["items"], line["cached_tokens"]) == (1, 0)
    assert line["prompt_tokens"] > 0
    assert line["render_s"] > 0
    assert line["first_token_s"] > 0
    assert line["replica"] == answer.headers["x-greenroom-replica"]


def test_the_lines_of_a_render_only_request_have_its_id_too(whole: Application) -> None:
    body = {"messages": about(picture(53))}
    whole.http.post("/v1/chat/completions/render", json=body, headers={"X-Request-Id": "rendered"})
    wait_until(
        lambda: "greenroom_RenderReplica" in {line.get("deployment") for line in lines("rendered")}, 30, "its line"
    )

"""An application without an engine tier, deployed by its config: what it renders, and what it says to generations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deployments.client import Client
from renderer.errors import NotSupportedError
from tests.faults.cluster import START_S, Deployed, RayCluster
from tests.faults.conftest import PATIENT
from tests.stack.helpers import about, picture

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S)]

ONE: dict[str, Any] = {"num_replicas": 1, "autoscaling_config": None}
CHAT = {"messages": about(picture(0)), "max_tokens": 4}
TOKENS = {"token_ids": [300, 301], "sampling_params": {"max_tokens": 4}}
GENERATIONS = [
    ("/v1/chat/completions", "chat_completions", CHAT),
    ("/v1/completions", "completions", {"prompt": "Hello"}),
    ("/inference/v1/generate", "generate", TOKENS),
]


@pytest.fixture(scope="module")
def app(cluster: RayCluster) -> Iterator[Deployed]:
    app = Deployed("tiers", cluster, {**PATIENT, "engine": None}, Router=ONE, RenderReplica=ONE)
    yield app
    app.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "method", "body"), GENERATIONS)
def test_without_an_engine_generation_is_a_501_over_http_and_over_a_handle(
    app: Deployed, path: str, method: str, body: dict[str, Any], stream: bool
) -> None:
    response = app.post(path, {**body, "stream": stream})
    assert response.status_code == 501, response.text
    assert "no engine tier" in response.json()["error"]["message"]
    with pytest.raises(NotSupportedError):
        _ = called(app, method, body, stream)


def called(app: Deployed, method: str, body: dict[str, Any], stream: bool) -> Any:
    """The answer over the handle, or its first piece."""
    if stream:
        return next(iter(getattr(app.handle.options(stream=True), f"{method}_stream").remote(body)))
    return app.call(method, body)


async def test_the_typed_client_says_so_too(app: Deployed) -> None:
    client = Client(handle=app.handle)
    assert (await client.render_chat(CHAT["messages"])).items  # type: ignore[arg-type]
    with pytest.raises(NotSupportedError, match="no engine tier"):
        await client.chat(CHAT["messages"])  # type: ignore[arg-type]


def test_all_else_is_served_and_it_is_healthy(app: Deployed) -> None:
    assert app.post("/v1/chat/completions/render", CHAT).headers["x-greenroom-tier"] == "render"
    assert app.http.get("/health").json()["status"] == "ok"

"""Images that come by their callers' names alone, where the render tier has more than one replica."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tests.stack.conftest import RENDERER
from tests.stack.helpers import Application, about, picture, wait_until

RENDER = "/v1/chat/completions/render"


@pytest.fixture(scope="module")
def pair(cluster: str) -> Iterator[Application]:
    """Two render replicas behind a router, and no engine."""
    config = {
        "name": "pair",
        "route_prefix": "/pair",
        "import_path": "deployments.app:build",
        "args": {"model": "demo/model", "renderer": RENDERER, "engine": None},
        "deployments": [{"name": "RenderReplica", "num_replicas": 2, "autoscaling_config": None}],
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [config]}))
    wait_until(lambda: serve.status().applications["pair"].status == "RUNNING", 240, "the application runs")
    application = Application("pair", f"{cluster}/pair", serve.get_app_handle("pair"))
    wait_until(lambda: len(application.tiers()["render"]) == 2, 60, "both render replicas run")
    yield application
    application.http.close()
    serve.delete("pair")


def named(uuid: str, sent: bool, **fields: Any) -> dict[str, Any]:
    body = {"messages": about(picture(5)), "request_id": "r", **fields}
    part = body["messages"][0]["content"][0]
    part |= {"uuid": uuid} if sent else {"uuid": uuid, "image_url": None}
    return body


def test_an_image_is_known_by_its_name_whichever_replica_it_was_sent_to(pair: Application) -> None:
    sent = pair.post(RENDER, named("the fifth", sent=True))
    assert sent.status_code == 200, sent.text
    for _ in range(5):
        known = pair.post(RENDER, named("the fifth", sent=False))
        assert known.status_code == 200, known.text
        assert known.json() == sent.json()
        prompt = pair.call("render_chat", named("the fifth", sent=False))
        assert list(prompt.token_ids) == sent.json()["token_ids"]
        assert prompt.items[0].tensors is not None
    tokens = pair.post("/tokenize", {"messages": named("the fifth", sent=False)["messages"]}).json()["tokens"]
    assert tokens == sent.json()["token_ids"]


def test_a_name_is_its_tenants_own(pair: Application) -> None:
    assert pair.post(RENDER, named("mine", sent=True, cache_salt="me")).status_code == 200
    assert pair.post(RENDER, named("mine", sent=False, cache_salt="me")).status_code == 200
    for fields in ({}, {"cache_salt": "you"}):
        response = pair.post(RENDER, named("mine", sent=False, **fields))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "image_url")

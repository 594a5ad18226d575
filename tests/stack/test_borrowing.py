"""An engine replica that borrows every item from two render replicas, and requests that those share between them."""

from __future__ import annotations

import io
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.calls import ReplicaReport
from renderer.prompt import RenderedPrompt
from tests.stack.conftest import RENDERER, SMALL
from tests.stack.helpers import Application, Picture, about, picture, wait_until

REPLICAS = 2
FAN_OUT = 8
PHOTO = (2400, 1600)
ENGINE = SMALL["engine"]


LENT = {
    "name": "lent",
    "route_prefix": "/lent",
    "import_path": "deployments.app:build",
    "args": {
        **SMALL,
        "engine": {**ENGINE, "borrow": "always"},
        "render": {"fan_out_items": FAN_OUT, "helpers": {"min_pixels": 0}},
    },
    "deployments": [{"name": "RenderReplica", "num_replicas": REPLICAS, "autoscaling_config": None}],
}


def deploy(*configs: dict[str, Any]) -> None:
    """Deploy applications; Serve deletes those that it once got this way and that are not named."""
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": list(configs)}))
    for config in configs:
        wait_until(partial(runs, config["name"]), 180, f"{config['name']} runs")


def runs(name: str) -> bool:
    return bool(serve.status().applications[name].status == "RUNNING")


@pytest.fixture(scope="module")
def lent(cluster: str) -> Iterator[Application]:
    deploy(LENT)
    application = Application("lent", f"{cluster}/lent", serve.get_app_handle("lent"))
    wait_until(lambda: borrows(application), 30, "the engine replica has found its helpers")
    yield application
    application.http.close()
    serve.delete("lent")


@pytest.fixture
def app(lent: Application) -> Application:
    wait_until(lambda: len(lent.tiers()["render"]) == REPLICAS, 60, "both render replicas run")
    lent.clear()
    return lent


def borrows(app: Application) -> bool:
    before = app.report("engine").items.get("borrowed", 0)
    assert app.post("/v1/chat/completions", body(picture(0), max_tokens=1)).status_code == 200
    app.clear()
    return app.report("engine").items.get("borrowed", 0) > before


def body(*pictures: Picture, **options: Any) -> dict[str, Any]:
    return {"messages": about(*pictures), "temperature": 0, "max_tokens": 12, "logprobs": True, **options}


def photos(number: int) -> list[Picture]:
    """Pictures that take a while to decode, no two alike."""
    return [Picture(_photo(seed), "") for seed in range(number)]


def _photo(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (*PHOTO[::-1], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG", quality=60)
    return stream.getvalue()


def lending(app: Application) -> Counter[str]:
    """Items that each render replica has processed for others."""
    return Counter({each.replica: each.requests.get("borrowed", 0) for each in app.tiers()["render"]})


def items(report: ReplicaReport) -> dict[str, int]:
    return {"borrowed": 0, "here": 0, "lost": 0, "returned": 0, **report.items}


def test_borrowed_items_change_neither_answers_nor_the_sender_cache(app: Application, whole: Application) -> None:
    whole.clear()
    before, lent_before = items(app.report("engine")), lending(app).total()
    shown = [[0], [1], [0, 2], [3], [0], [1, 1, 4], [2]]  # more than the cache of three holds
    requests = [body(*map(picture, numbers)) for numbers in shown]
    answers = [[each.post("/v1/chat/completions", request).json() for request in requests] for each in (app, whole)]
    for ours, theirs in zip(*answers, strict=True):
        assert (ours["choices"], ours["usage"]) == (theirs["choices"], theirs["usage"])
    assert app.cache("engine", "sender") == whole.cache("engine", "sender")
    after, caches = items(app.report("engine")), app.cache("engine", "sender")
    borrowed = after["borrowed"] - before["borrowed"]
    assert borrowed == lending(app).total() - lent_before == caches.misses
    assert after["here"] == before["here"]
    assert items(whole.report("engine"))["borrowed"] == 0, "auto keeps small items"


def test_a_request_of_many_items_is_shared_by_the_tier_and_equals_the_one_rendered_alone(
    app: Application, whole: Application
) -> None:
    before = lending(app)
    messages = {"messages": about(*map(picture, range(3 * FAN_OUT)))}
    shared, alone = app.call("render_chat", messages), whole.call("render_chat", messages)
    assert isinstance(shared, RenderedPrompt)
    assert shared.layout() == alone.layout()
    for ours, theirs in zip(shared.items, alone.items, strict=True):
        assert ours.tensors is not None
        assert theirs.tensors is not None
        assert all(np.array_equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)
    assert (lending(app) - before).total() > 0
    assert [items(each)["returned"] for each in app.tiers()["render"]] == [0] * REPLICAS, "none waited for itself"
    few = lending(app)
    app.call("render_chat", {"messages": about(*map(picture, range(30, 30 + FAN_OUT - 1)))})
    assert lending(app) == few, "a request of few items stays where it is"


def test_render_replicas_that_are_the_ingress_share_a_request_too(
    cluster: str, whole: Application, lent: Application
) -> None:
    config = {
        "name": "direct",
        "route_prefix": "/direct",
        "import_path": "deployments.app:build_render",
        "args": {
            "model": "demo/model",
            "renderer": RENDERER,
            "engine": None,
            "render": {"fan_out_items": FAN_OUT, "helpers": {"min_pixels": 0}},
        },
        "deployments": [{"name": "RenderIngress", "num_replicas": REPLICAS, "autoscaling_config": None}],
    }
    deploy(LENT, config)
    app = Application("direct", f"{cluster}/direct", serve.get_app_handle("direct"))
    messages = {"messages": about(*map(picture, range(3 * FAN_OUT)))}
    alone = whole.call("render_chat", messages)

    def shared() -> bool:
        app.clear()
        assert app.call("render_chat", messages).layout() == alone.layout()
        return lending(app).total() > 0

    wait_until(shared, 60, "the replicas have found each other")
    app.http.close()
    serve.delete("direct")


def test_auto_keeps_large_photos_from_a_replica_that_is_decoding(whole: Application) -> None:
    whole.clear()
    before, lent_before = items(whole.report("engine")), lending(whole).total()
    story = {**body(picture(0), max_tokens=3000), "ignore_eos": True, "stream": True, "logprobs": False}
    with whole.http.stream("POST", "/v1/chat/completions", json=story) as stream:
        lines = stream.iter_lines()
        next(lines)  # it decodes from here on
        assert whole.post("/v1/chat/completions", body(*photos(3), max_tokens=1)).status_code == 200
        assert whole.report("engine").under_way["sequences"] == 1, "the story was being told all the time"
    after = items(whole.report("engine"))
    assert after["borrowed"] - before["borrowed"] == lending(whole).total() - lent_before == 3
    assert after["here"] - before["here"] == 1, "the story's own small picture"


def test_items_are_given_up_within_a_second_when_the_client_leaves(app: Application) -> None:
    request = {**body(*photos(12), max_tokens=3000), "stream": True, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        app.http.post("/v1/chat/completions", json=request, timeout=httpx.Timeout(30, read=0.4))
    wait_until(lambda: idle(app), 1.5, "nothing is done any more")
    assert app.cache("engine", "sender").misses == 0, "a request that is cancelled leaves no trace"
    assert app.cache("engine", "sender").pinned == 0


def test_who_leaves_takes_no_borrowed_item_from_others_who_wait_for_it(app: Application, whole: Application) -> None:
    shown = photos(6)
    expected = whole.post("/v1/chat/completions", body(*shown)).json()
    with ThreadPoolExecutor(2) as clients:
        leaving = clients.submit(app.http.post, "/v1/chat/completions", json=body(*shown), timeout=0.3)
        staying = clients.submit(app.post, "/v1/chat/completions", body(*shown))
        with pytest.raises(httpx.ReadTimeout):
            leaving.result(30)
        assert staying.result(60).json()["choices"] == expected["choices"]


def idle(app: Application) -> bool:
    tiers = app.tiers()
    assert tiers["engine"][0].engine is not None
    busy = [tiers["engine"][0].under_way["sequences"], *(each.under_way["render_seconds"] for each in tiers["render"])]
    return sum(busy) == 0 and tiers["engine"][0].engine.running == 0


def test_a_helper_that_is_killed_takes_no_request_with_it(app: Application, whole: Application) -> None:
    request = body(*photos(12))
    expected = whole.post("/v1/chat/completions", request).json()
    before, known = items(app.report("engine")), lending(app)
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(app.post, "/v1/chat/completions", request)
        wait_until(lambda: any(kill(each) for each in working(app, known)), 20, "a helper works")
        response = answer.result(60)
    assert response.status_code == 200
    assert response.json()["choices"] == expected["choices"]
    after = items(app.report("engine"))
    assert after["lost"] > before["lost"]
    assert after["borrowed"] > before["borrowed"]


def kill(report: ReplicaReport) -> bool:
    os.kill(report.pid, signal.SIGKILL)
    return True


def working(app: Application, known: Counter[str]) -> list[ReplicaReport]:
    return [
        each
        for each in app.tiers()["render"]
        if each.under_way["render_seconds"] > 0 and each.requests.get("borrowed", 0) > known[each.replica]
    ]

"""Each configuration's tiers: what is served where, and what is a 501."""

from __future__ import annotations

from tests.stack.helpers import Application, about, picture


def test_render_replicas_as_the_ingress_answer_as_the_router_does(render_only: Application, whole: Application) -> None:
    for path, body in (
        ("/v1/chat/completions/render", {"messages": about(picture(0)), "request_id": "r"}),
        ("/v1/completions/render", {"prompt": ["Hello", "there"], "request_id": "r"}),
        ("/tokenize", {"messages": about(picture(0))}),
        ("/detokenize", {"tokens": [300, 301]}),
    ):
        direct, routed = render_only.post(path, body), whole.post(path, body)
        assert direct.status_code == 200, direct.text
        assert direct.json() == routed.json()
        assert direct.headers["x-greenroom-tier"] == "render"
        assert direct.headers["x-greenroom-replica"] == render_only.report("render").replica


def test_without_an_engine_generation_is_a_501_that_says_so(render_only: Application) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": about(picture(0))}),
        ("/v1/chat/completions", {"messages": about(picture(0)), "stream": True}),
        ("/v1/completions", {"prompt": "Hello"}),
    ):
        response = render_only.post(path, body)
        assert response.status_code == 501
        assert "engine" in response.json()["error"]["message"]


def test_without_a_render_tier_an_engine_replica_renders(alone: Application) -> None:
    response = alone.post("/v1/chat/completions/render", {"messages": about(picture(0))})
    assert response.headers["x-greenroom-tier"] == "engine"
    assert response.json()["features"]["kwargs_data"]["image"]


def test_render_answers_ask_for_no_more_than_the_engine_holds(alone: Application) -> None:
    (card,) = alone.http.get("/v1/models").json()["data"]
    assert card["max_model_len"] == 2048
    body = {"messages": about(picture(0)), "max_tokens": 2040}
    rendered = alone.post("/v1/chat/completions/render", body).json()
    assert rendered["sampling_params"]["max_tokens"] == 2048 - len(rendered["token_ids"])
    assert alone.post("/tokenize", {"prompt": "Hello"}).json()["max_model_len"] == 2048
    assert alone.post("/inference/v1/generate", rendered).status_code == 200
    assert alone.post("/v1/chat/completions", body).status_code == 200


def test_models_are_those_that_requests_may_name(whole: Application) -> None:
    (card,) = whole.http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("demo/model", 4096)


def test_health_of_render_replicas_as_the_ingress(render_only: Application) -> None:
    response = render_only.http.get("/health")
    assert response.status_code == 200
    assert list(response.json()["tiers"]) == ["render"]

"""Sampling fields, tokenize, detokenize and derender are answered as the peer answers, over the same routes.

`tests/goldens/exchanges.py` holds the bodies, the golden files the peer's recorded answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient

from deployments.backends import LocalBackend
from deployments.config import GreenroomConfig
from deployments.front import Front
from deployments.http.routes import http_app
from deployments.operations import Operations
from deployments.records import Record
from deployments.rendering import RenderOnly
from renderer.renderer import Renderer
from tests.checkpoints import FAMILIES, checkpoint
from tests.families.conftest import RendererOf
from tests.goldens.exchanges import ask, exchanges
from tests.goldens.files import golden

# What a reader of the protocol fills in where `sampling_params` is silent.
DEFAULTS: Mapping[str, Any] = {
    "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0,
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "stop": [], "stop_token_ids": [], "ignore_eos": False, "max_tokens": 16,
    "min_tokens": 0, "detokenize": True, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False, "bad_words": [],
}  # fmt: skip
# How vLLM hands outputs on inside, or what its engine derives from the other fields by itself.
INTERNAL = ("output_text_buffer_length", "skip_clone", "skip_reading_prefix_cache")
# What the peer takes and we refuse by name.
REFUSED_HERE = {
    "chat: echo": "echo", "chat: echo with logprobs": "echo", "completion: echo": "echo",
    "completion: echo with logprobs": "echo", "completion: echo without a word": "echo",
}  # fmt: skip
KINDS = ("chat: ", "completion: ", "tokenize: ", "detokenize: ", "derender ")
# A character that the end of the output cuts in half: the peer leaves it out, here it is U+FFFD.
HALF = "derender chat: half a character"
ClientOf = Callable[[str], TestClient]


@pytest.fixture(scope="module")
def client_of(renderer_of: RendererOf) -> Iterator[ClientOf]:
    """A client of a family's render tier in this process."""
    made: dict[str, TestClient] = {}
    with ExitStack() as stack:

        def make(family: str) -> TestClient:
            if family not in made:
                made[family] = stack.enter_context(TestClient(render_tier(family, renderer_of(family))))
            return made[family]

        yield make


def render_tier(family: str, renderer: Renderer) -> Any:
    config = GreenroomConfig.model_validate({"model": str(checkpoint(family)), "engine": None})
    record = Record("render")
    return http_app(Operations(Front(config, LocalBackend(RenderOnly(renderer, record))), record))


def meaning(answer: Any) -> Any:
    """An answer without what carries no meaning: nulls, defaults, and `content` of no text in a stream."""
    if isinstance(answer, list):
        return [meaning(each) for each in answer]
    if not isinstance(answer, dict):
        return answer
    found = {name: meaning(value) for name, value in answer.items() if value is not None}
    if "sampling_params" in found:
        found["sampling_params"] = parameters(found["sampling_params"])
    if "delta" in found and not found["delta"].get("content"):
        found["delta"].pop("content", None)
    return found


def parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {**DEFAULTS, **{name: value for name, value in given.items() if name not in INTERNAL}}
    if "structured_outputs" in found:
        found["structured_outputs"] = {name: value for name, value in found["structured_outputs"].items() if value}
    return found


def prompts_of(answers: list[Any]) -> Iterator[Any]:
    """The generate requests among the answers."""
    for answer in answers:
        for each in answer if isinstance(answer, list) else [answer]:
            if "sampling_params" in each:
                yield each


def refused(answers: list[Any]) -> bool:
    return "status" in answers[0]


def names(family: str, kind: str) -> list[str]:
    return [name for name in exchanges(family) if name.startswith(kind) and name != HALF]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_the_peers_with_max_tokens_always(family: str, kind: str, client_of: ClientOf) -> None:
    assert names(family, kind)
    for name in names(family, kind):
        theirs = golden(family)["exchanges"][name]
        if refused(theirs) or name in REFUSED_HERE:
            continue
        ours = ask(client_of(family), exchanges(family)[name])
        assert meaning(ours) == meaning(theirs), name
        assert all("max_tokens" in prompt["sampling_params"] for prompt in prompts_of(ours)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_peer_refuses_is_refused_and_the_field_is_named(family: str, client_of: ClientOf) -> None:
    for name, theirs in golden(family)["exchanges"].items():
        if refused(theirs):
            (ours,) = ask(client_of(family), exchanges(family)[name])
            assert ours["status"] == theirs[0]["status"] == 400, name
            assert ours["param"] == theirs[0]["param"] or theirs[0]["param"] is None, name
            assert ours["param"], name


@pytest.mark.parametrize("name", REFUSED_HERE)
def test_what_we_alone_refuse_is_refused_by_name(name: str, client_of: ClientOf) -> None:
    assert not refused(golden("llama")["exchanges"][name])
    (ours,) = ask(client_of("llama"), exchanges("llama")[name])
    assert (ours["status"], ours["param"]) == (400, REFUSED_HERE[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_character_at_the_end_is_seen(family: str, client_of: ClientOf) -> None:
    (ours,), (theirs,) = ask(client_of(family), exchanges(family)[HALF]), golden(family)["exchanges"][HALF]
    text, whole = (answer["choices"][0]["message"]["content"] for answer in (ours, theirs))
    assert text.rstrip("\ufffd") == whole
    assert text != whole

"""Every sampling field over HTTP, of chat and of completions: it does what it says, the same on both routes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.stack.helpers import Application

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
RANDOM = {"temperature": 1.5, "seed": 3}
LONGEST = 200
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}},
    "required": ["shape"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


@dataclass(frozen=True)
class Choice:
    text: str
    finish_reason: str
    stop_reason: int | str | None
    tokens: int
    """Of all choices together."""


@dataclass(frozen=True)
class Asker:
    """One application, asked the same on both routes.

    Attributes:
        prompt: What the chat template makes of the messages.
        greedy: The answer without any field but these two.
        ids: Its tokens.
    """

    app: Application
    prompt: list[int]
    greedy: Choice
    ids: list[int]

    def ask(self, **fields: Any) -> list[Choice]:
        """The choices of chat, which are those of completions."""
        told = {"max_tokens": LONGEST, "temperature": 0} | fields
        chat, text = choices(self.app, CHAT, {"messages": MESSAGES, **told}), self.complete(**told)
        assert chat == text
        return chat

    def complete(self, **fields: Any) -> list[Choice]:
        return choices(self.app, TEXT, {"prompt": self.prompt, **fields})


def choices(app: Application, path: str, body: dict[str, Any]) -> list[Choice]:
    response = app.post(path, body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return [
        Choice(
            choice["text"] if path == TEXT else choice["message"]["content"],
            choice["finish_reason"],
            choice["stop_reason"],
            answer["usage"]["completion_tokens"],
        )
        for choice in answer["choices"]
    ]


@pytest.fixture(scope="module")
def asker(whole: Application) -> Asker:
    prompt = whole.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    (greedy,) = choices(whole, CHAT, {"messages": MESSAGES, "temperature": 0, "max_tokens": LONGEST})
    assert greedy.finish_reason == "stop"
    asked = {"token_ids": prompt, "sampling_params": {"temperature": 0, "max_tokens": LONGEST}}
    ids = whole.post("/inference/v1/generate", asked).json()["choices"][0]["token_ids"]
    assert len(ids) == greedy.tokens
    return Asker(whole, prompt, greedy, ids)


def is_another_text(asker: Asker, got: Choice) -> None:
    assert got.text != asker.greedy.text


def is_another_of_the_same_seed(asker: Asker, got: Choice) -> None:
    assert got.text != asker.ask(**RANDOM)[0].text


def is_greedy(asker: Asker, got: Choice) -> None:
    assert got == asker.greedy


def is_json(asker: Asker, got: Choice) -> None:
    """As far as it goes: the model tells its story in the first string."""
    assert got.text.startswith('{"')
    assert got.finish_reason == "length" or isinstance(json.loads(got.text), dict)


def follows_the_schema(asker: Asker, got: Choice) -> None:
    assert json.loads(got.text)["shape"] in ("circle", "square")


def ends_after_five(asker: Asker, got: Choice) -> None:
    assert (got.tokens, got.finish_reason) == (5, "length")
    assert asker.greedy.text.startswith(got.text)


def ends_before_the_stop(asker: Asker, got: Choice) -> None:
    stop = str(got.stop_reason)
    assert (got.text, got.finish_reason) == (asker.greedy.text.partition(stop)[0], "stop")
    assert stop in asker.greedy.text


def goes_on_to_the_limit(asker: Asker, got: Choice) -> None:
    assert (got.tokens, got.finish_reason) == (LONGEST, "length")
    assert got.text.startswith(asker.greedy.text)


def goes_on_for_longer(asker: Asker, got: Choice) -> None:
    assert got.tokens >= LONGEST - 20 > asker.greedy.tokens


FIELDS: dict[str, tuple[dict[str, Any], Callable[[Asker, Choice], None]]] = {
    "temperature": (RANDOM, is_another_text),
    "top_p": ({**RANDOM, "top_p": 1e-6}, is_greedy),
    "top_k": ({**RANDOM, "top_k": 1}, is_greedy),
    "min_p": ({**RANDOM, "min_p": 1.0}, is_greedy),
    "max_tokens": ({"max_tokens": 5}, ends_after_five),
    "stop": ({"stop": ["nowhere", "."]}, ends_before_the_stop),
    "ignore_eos": ({"ignore_eos": True}, goes_on_to_the_limit),
    "min_tokens": ({"min_tokens": LONGEST - 20}, goes_on_for_longer),
    "presence_penalty": ({**RANDOM, "presence_penalty": 2.0}, is_another_of_the_same_seed),
    "frequency_penalty": ({"frequency_penalty": 2.0}, is_another_text),
    "repetition_penalty": ({"repetition_penalty": 2.0}, is_another_text),
    "response_format json_object": ({"response_format": {"type": "json_object"}}, is_json),
    "response_format json_schema": ({**RANDOM, "response_format": FORM}, follows_the_schema),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_does_what_it_says(asker: Asker, field: str) -> None:
    fields, check = FIELDS[field]
    (got,) = asker.ask(**fields)
    check(asker, got)


def test_a_stop_token_ends_the_output(asker: Asker) -> None:
    stop = asker.ids[4]
    (got,) = asker.ask(stop_token_ids=[stop])
    assert (got.finish_reason, got.stop_reason, got.tokens) == ("stop", stop, asker.ids.index(stop) + 1)
    assert asker.greedy.text.startswith(got.text)


def test_a_seed_gives_its_own_text_every_time(asker: Asker) -> None:
    first, again, other = (asker.ask(temperature=2, seed=seed, max_tokens=64)[0].text for seed in (3, 3, 4))
    assert first == again != other


def test_n_choices_are_those_of_n_seeds(asker: Asker) -> None:
    three = asker.ask(temperature=2, seed=3, n=3, max_tokens=64)
    alone = [asker.ask(temperature=2, seed=3 + index, max_tokens=64)[0] for index in range(3)]
    assert [choice.text for choice in three] == [choice.text for choice in alone]
    assert len({choice.text for choice in alone}) == 3
    assert three[0].tokens == sum(choice.tokens for choice in alone)


def test_logprobs_are_the_same_in_both_forms(asker: Asker) -> None:
    asked = {"temperature": 0, "max_tokens": 8}
    chat = asker.app.post(CHAT, {"messages": MESSAGES, **asked, "logprobs": True, "top_logprobs": 3}).json()
    text = asker.app.post(TEXT, {"prompt": asker.prompt, **asked, "logprobs": 3}).json()
    entries, flat = chat["choices"][0]["logprobs"]["content"], text["choices"][0]["logprobs"]
    assert flat["tokens"] == [entry["token"] for entry in entries]
    assert flat["token_logprobs"] == pytest.approx([entry["logprob"] for entry in entries], abs=1e-3)
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    for tops, entry in zip(flat["top_logprobs"], entries, strict=True):
        assert tops[entry["token"]] == max(tops.values())

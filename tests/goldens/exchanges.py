"""What is asked of the routes beside rendering, of every family: sampling fields, tokenize, detokenize, derender.

A list for the recorder, which asks the peer, and for the tests, which ask us with the same bodies.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from tokenizers import Tokenizer

from tests.checkpoints import CHECKPOINTS, IMAGE_FAMILIES, checkpoint
from tests.goldens.cases import SMALL, TOOLS, image, message_body, user

CHAT, TEXT = "/v1/chat/completions/render", "/v1/completions/render"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
DERENDER_CHAT, DERENDER_TEXT = "/v1/chat/completions/derender", "/v1/completions/derender"
# Of a rendered prompt: the cases of `cases.py` compare the rest of it.
_OF_RENDERED = ("sampling_params", "token_offsets", "reasoning_ended", "stream", "stream_options", "priority")
_SENTENCE = "Größe? 日本 😀 It is  a disc.\n\n Well"


@dataclass(frozen=True, slots=True)
class Exchange:
    """Bodies that are posted one after the other, each with the `stream_state` of the answer before it."""

    name: str
    path: str
    bodies: tuple[Mapping[str, Any], ...]


class Answer(Protocol):
    """Of an HTTP client."""

    @property
    def status_code(self) -> int: ...
    def json(self) -> Any: ...


class Client(Protocol):
    """Posts JSON."""

    def post(self, url: str, *, json: Any) -> Answer: ...


@cache
def exchanges(family: str) -> Mapping[str, Exchange]:
    """All exchanges with a family, by name."""
    found = [*_sampling(family), *_tokenizing(family), *_derendering(family)]
    named = {exchange.name: exchange for exchange in found}
    if len(named) != len(found):
        raise ValueError(f"two exchanges of {family} have one name")
    return named


def ask(client: Client, exchange: Exchange) -> list[Any]:
    """What is kept of the answers: what does not depend on the hour, the server's name and how it keeps its streams."""
    answers, state = [], None
    for body in exchange.bodies:
        answer = client.post(exchange.path, json={**body, "stream_state": state} if state else body)
        content = answer.json()
        answers.append(_kept(exchange.path, answer.status_code, content))
        state = content.get("stream_state") if isinstance(content, Mapping) else None
    return answers


def _kept(path: str, status: int, content: Any) -> Any:
    if status != 200:
        return {"status": status, "type": content["error"]["type"], "param": content["error"]["param"]}
    if path == TEXT:
        return [_kept(CHAT, status, prompt) for prompt in content]
    if path == CHAT:
        return {name: content[name] for name in _OF_RENDERED}
    content = content.get("chunk", content)
    return {name: value for name, value in content.items() if name not in ("created", "model")}


_ALL_FIELDS_OF = ("qwen2", "llama", "qwen2_5_vl")
_OF_EVERY_FAMILY = ("nothing", "max_tokens", "greedy", "penalties", "stream_options")
HELLO = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "request_id": "x"}
ONCE = {"prompt": "Once upon a time", "request_id": "x"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "max_tokens": {"max_tokens": 5},
    "max_tokens 16": {"max_tokens": 16},
    "max_completion_tokens": {"max_tokens": 5, "max_completion_tokens": 7},
    "temperature": {"temperature": 0.3, "top_p": 0.9, "top_k": 7, "min_p": 0.05},
    "greedy": {"temperature": 0, "top_p": 0.9, "top_k": 7, "min_p": 0.05},
    "a temperature next to nothing": {"temperature": 0.001},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2},
    "seed": {"seed": 7},
    "no seed": {"seed": -1},
    "n": {"n": 3},
    "stop": {"stop": "END"},
    "stops": {"stop": ["END", "."], "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": [5, 5, 3]},
    "min_tokens": {"min_tokens": 2, "ignore_eos": True},
    "special tokens": {"skip_special_tokens": False},
    "stream": {"stream": True},
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    "priority": {"priority": 3},
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
    "free text": {"response_format": {"type": "text"}},
    "logit_bias": {"logit_bias": {"5": 1.5, "7": -200}},
    "logit_bias of a word": {"logit_bias": {"abc": 1}},
    "allowed_token_ids": {"allowed_token_ids": [5, 6]},
    "bad_words": {"bad_words": ["ugly", "bad", "ugly"]},
    "an empty bad word": {"bad_words": [""]},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "prompt_logprobs of a stream": {"prompt_logprobs": 2, "stream": True},
    "prompt_logprobs below": {"prompt_logprobs": -2},
    "all prompt_logprobs": {"prompt_logprobs": -1},
    "spaces between special tokens": {"spaces_between_special_tokens": False},
    "thinking_token_budget": {"thinking_token_budget": 9},
    "no thinking_token_budget": {"thinking_token_budget": -1},
    "thinking_token_budget below": {"thinking_token_budget": -3},
    "stream_interval": {"stream_interval": 4},
    "stream_interval below": {"stream_interval": 0},
    "repetition_detection": {"repetition_detection": {"max_pattern_size": 8, "min_pattern_size": 2, "min_count": 3}},
    "a choice": {"structured_outputs": {"choice": ["yes", "no"]}},
    "a regular expression": {"structured_outputs": {"regex": "[0-9]+"}},
    "a grammar": {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}},
    "a schema": {"structured_outputs": {"json": SCHEMA}},
    "two structures": {"structured_outputs": {"json": SCHEMA, "regex": "a"}},
    "vllm_xargs": {"vllm_xargs": {"a": 1, "b": "c"}},
    "kv_transfer_params": {"kv_transfer_params": {"a": 1}},
    "ec_transfer_params": {"ec_transfer_params": {"a": 1}},
    "watermarking": {"watermarking": False},
    "routed_experts_prompt_start": {"routed_experts_prompt_start": 2},
    "length_penalty": {"length_penalty": 0.5},
    "return_token_ids": {"return_token_ids": True, "return_tokens_as_token_ids": True},
    "user": {"user": "me", "session_id": "s"},
    "beams": {"use_beam_search": True},
    "echo": {"echo": True},
}  # fmt: skip
_CHAT_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 3},
    "logprob_token_ids": {"logprobs": True, "logprob_token_ids": [5, 6]},
    "logprob_token_ids alone": {"logprob_token_ids": [5, 6]},
    "reasoning": {"include_reasoning": False},
    "return_prompt_text": {"return_prompt_text": True},
    "parallel_tool_calls": {"parallel_tool_calls": False},
    "echo with logprobs": {"echo": True, "logprobs": True, "top_logprobs": 2},
}
_OFFSETS: Mapping[str, Mapping[str, Any]] = {
    "offsets": {"return_token_offsets": True},
    "offsets with special tokens": {"return_token_offsets": True, "add_special_tokens": True},
    "offsets truncated": {"return_token_offsets": True, "truncate_prompt_tokens": 4},
    "offsets truncated at the left": {
        "return_token_offsets": True, "truncate_prompt_tokens": 4, "truncation_side": "left",
    },
    "offsets truncated at the right": {
        "return_token_offsets": True, "truncate_prompt_tokens": 4, "truncation_side": "right",
    },
}  # fmt: skip
_TEXT_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "logprobs": {"logprobs": 3},
    "no logprobs": {"logprobs": 0},
    "logprob_token_ids": {"logprobs": 2, "logprob_token_ids": [5, 6]},
    "null max_tokens": {"max_tokens": None},
    "echo with logprobs": {"echo": True, "logprobs": 2},
    "echo without a word": {"echo": True, "max_tokens": 0},
    "suffix": {"suffix": "the end"},
    "offsets of two prompts": {"prompt": ["Once", "upon a time"], "return_token_offsets": True},
    "offsets of token ids": {"prompt": [5, 6], "return_token_offsets": True},
}


def _sampling(family: str) -> Iterator[Exchange]:
    """All fields of some families; of the others what their own generation defaults matter to."""
    of_chats, of_texts = {**_FIELDS, **_OFFSETS, **_CHAT_FIELDS}, {**_FIELDS, **_OFFSETS, **_TEXT_FIELDS}
    if family not in _ALL_FIELDS_OF:
        of_chats = of_texts = {name: _FIELDS[name] for name in _OF_EVERY_FAMILY}
    for name, fields in of_chats.items():
        yield Exchange(f"chat: {name}", CHAT, ({**HELLO, **fields},))
    for name, fields in of_texts.items():
        if "max_completion_tokens" not in fields:
            yield Exchange(f"completion: {name}", TEXT, ({**ONCE, **fields},))


def _tokenizing(family: str) -> Iterator[Exchange]:
    ids = _ids(family)
    ask_it = [{"role": "user", "content": "What is it?"}]
    texts: Mapping[str, Mapping[str, Any]] = {
        "a text": {"prompt": _SENTENCE},
        "its pieces": {"prompt": _SENTENCE, "return_token_strs": True},
        "no special tokens": {"prompt": _SENTENCE, "add_special_tokens": False},
        "nothing": {"prompt": ""},
        "a chat": {"messages": ask_it, "return_token_strs": True},
        "a chat without a generation prompt": {"messages": ask_it, "add_generation_prompt": False},
        "special tokens on top": {"messages": ask_it, "add_special_tokens": True},
        "a chat beside a text": {"messages": ask_it, "prompt": "other"},
        "tools": {"messages": ask_it, "tools": list(TOOLS)},
        "a message to continue": {
            "messages": [*ask_it, {"role": "assistant", "content": "It is a"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
    }
    for name, body in texts.items():
        yield Exchange(f"tokenize: {name}", TOKENIZE, (body,))
    if family in IMAGE_FAMILIES:
        shown = {"messages": [message_body(user("See ", image(SMALL), " and say."))]}
        yield Exchange("tokenize: an image", TOKENIZE, ({**shown, "return_token_strs": True},))
        if family in _ALL_FIELDS_OF:
            asked = {**shown, "return_token_offsets": True, "mm_payload": "none"}
            yield Exchange("chat: offsets of an image", CHAT, (asked,))
    for name, tokens in {
        "a text": ids,
        "special tokens": [*ids, _end(family)],
        "beyond the vocabulary": [*ids[:2], 10**6, *ids[2:]],
        "half a character": ids[:-1],
        "nothing": [],
    }.items():
        yield Exchange(f"detokenize: {name}", DETOKENIZE, ({"tokens": tokens},))


def _derendering(family: str) -> Iterator[Exchange]:
    ids, end = _ids(family), _end(family)
    ended = _choice([*ids, end], finish_reason="stop")
    first, second = _answer(ended), _answer(_choice(ids, finish_reason="length"))
    told = _answer({**ended, "logprobs": _logprobs([*ids, end])})
    chats: Mapping[str, Mapping[str, Any]] = {
        "a text": {"generate_response": first},
        "cut at its length": {"generate_response": second},
        "after a prompt": {"generate_response": first, "prompt_tokens": 9, "prompt_token_ids": ids[-9:]},
        "special tokens": {"generate_response": first, "chat_request": {**HELLO, "skip_special_tokens": False}},
        "token ids": {"generate_response": first, "chat_request": {**HELLO, "return_token_ids": True}},
        "two choices": {"generate_response": _answer(ended, {**_choice(ids[2:]), "index": 1})},
        "a stop string": {"generate_response": _answer({**ended, "stop_reason": "disc"})},
        "logprobs": {"generate_response": told},
        "no tokens": {"generate_response": _answer(_choice([]))},
        "half a character": {"generate_response": _answer(_choice(ids[: len(ids) // 2 + 1], finish_reason="length"))},
    }
    for name, body in chats.items():
        yield Exchange(f"derender chat: {name}", DERENDER_CHAT, (body,))
    texts: Mapping[str, Mapping[str, Any]] = {
        "a text": {"generate_responses": [first]},
        "two prompts": {"generate_responses": [first, second], "prompt_tokens": [3, 4]},
        "logprobs": {"generate_responses": [told]},
        "none": {"generate_responses": []},
        "special tokens": {
            "generate_responses": [first],
            "completion_request": {**ONCE, "skip_special_tokens": False},
        },
    }
    for name, body in texts.items():
        yield Exchange(f"derender text: {name}", DERENDER_TEXT, (body,))
    for name, cuts in {"token by token": range(1, len(ids)), "in pieces": (3, 4, 9)}.items():
        for path, kind in ((DERENDER_CHAT, "chat"), (DERENDER_TEXT, "text")):
            yield Exchange(f"derender {kind} stream: {name}", path, tuple(_chunks([*ids, end], cuts)))
    with_logprobs = tuple(_chunks([*ids, end], (3, 4, 9), logprobs=True))
    yield Exchange("derender chat stream: logprobs", DERENDER_CHAT, with_logprobs)
    yield Exchange("derender text stream: logprobs", DERENDER_TEXT, with_logprobs)


def _chunks(ids: list[int], cuts: Sequence[int], logprobs: bool = False) -> Iterator[dict[str, Any]]:
    """A stream of the output, and a last chunk with its usage."""
    edges = [0, *cuts, len(ids)]
    for start, stop in itertools.pairwise(edges):
        choice = _choice(ids[start:stop], finish_reason="stop" if stop == len(ids) else None)
        if logprobs:
            choice["logprobs"] = _logprobs(ids[start:stop])
        yield {"stream": True, "generate_chunk": {"request_id": "generate-tokens-x", "choices": [choice]}}
    usage = {"prompt_tokens": 3, "completion_tokens": len(ids), "total_tokens": 3 + len(ids)}
    chunk = {"request_id": "generate-tokens-x", "choices": [], "usage": usage}
    yield {"stream": True, "generate_chunk": chunk, "prompt_tokens": 9}


def _answer(*choices: Mapping[str, Any]) -> dict[str, Any]:
    return {"request_id": "generate-tokens-x", "choices": list(choices)}


def _choice(ids: list[int], **fields: Any) -> dict[str, Any]:
    return {"index": 0, "token_ids": ids, **fields}


def _logprobs(ids: list[int]) -> dict[str, Any]:
    """As an engine tells them: the sampled token first, and the likeliest."""
    entries = []
    for place, token_id in enumerate(ids):
        sampled = {"token_id": token_id, "logprob": -0.25 * place, "rank": 1}
        other = {"token_id": ids[place - 1], "logprob": -5.5, "rank": 2}
        entries.append({**sampled, "top_logprobs": [sampled, other]})
    return {"content": entries}


@cache
def _tokenizer(family: str) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint(family) / "tokenizer.json"))


def _ids(family: str) -> list[int]:
    ids: list[int] = _tokenizer(family).encode(_SENTENCE, add_special_tokens=False).ids
    return ids


def _end(family: str) -> int:
    eos = CHECKPOINTS[family].tokenizer.eos
    if eos is None:
        raise ValueError(f"{family} has no end token")
    return _tokenizer(family).get_vocab()[eos]

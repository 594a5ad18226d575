"""Mixed requests whose answers are known, from clients that behave as the failure rules expect: what a broken ingress
cuts off they ask again, anything else must be right the first time."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any

import httpx
import msgpack
import numpy as np
from PIL import Image
from ray.exceptions import RayActorError

from deployments.client import Client
from renderer.errors import GreenroomError
from renderer.prompt import RenderedPrompt
from tests.stack.helpers import QUESTION, about, picture, wait_until

RETRY_PAUSE_S = 0.25
# A lone proxy is away for some 25 s, a lone router for as long as its replacement takes to start.
PATIENCE_S = 600.0
HANDLE = "handle:"
MSGPACK = "application/x-msgpack"
STORY = "Tell me a story."


@dataclass(frozen=True)
class Ask:
    """One request. Equal asks have equal answers: greedy, seeded, or nothing that an engine has a part in.

    Attributes:
        path: Of HTTP, or `handle:` and the method that is called in its place.
        accept: The form of the answer.
        status: That the right answer has.
    """

    kind: str
    path: str
    body: Mapping[str, Any]
    accept: str = "application/json"
    status: int = 200


class IngressBrokeError(Exception):
    """The connection or the router behind it went away before the whole answer was there."""


class WrongAnswerError(Exception):
    """An answer that no failure rule allows."""


@dataclass(frozen=True)
class Answer:
    """What must be the same whenever an ask is answered, and who answered."""

    content: str
    replica: str
    timing: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """How a request went. `failure` is None where the answer is the right one; `broken` says how the tries before it
    were cut off."""

    ask: Ask
    begun: float
    ended: float
    broken: tuple[str, ...]
    failure: str | None
    answer: Answer | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


def mixed_asks(rng: random.Random, number: int, tokens: int = 48) -> list[Ask]:
    """So many different asks of every kind, text and images, in turn."""
    over_http = (_chat, _stream, _seeded, _render, _layout, _tokenize, _completion, _detokenize, _choices, _generate)
    makers = itertools.cycle((*over_http, _msgpack, _handle_chat, _handle_render, _stalled))
    return [next(makers)(rng, tokens) for _ in range(number)]


def story(number: int, tokens: int, **options: Any) -> Ask:
    """A streamed story about a picture, of exactly so many tokens."""
    body = {"messages": about(picture(number), text=STORY), "ignore_eos": True, "max_tokens": tokens, **options}
    return Ask("stream", "/v1/chat/completions", {"stream_options": {"include_usage": True}, "stream": True, **body})


async def ask_once(http: httpx.AsyncClient, ask: Ask) -> Answer:
    """The whole answer to one request.

    Raises:
        IngressBrokeError: Asking again is what a client does.
        WrongAnswerError: The status is none that the failure rules allow.
    """
    if ask.path.startswith(HANDLE):
        return await _called(str(http.base_url), ask)
    try:
        async with http.stream("POST", ask.path, json=ask.body, headers={"Accept": ask.accept}) as response:
            # An answer of Greenroom's own says who gave it; one of Serve's proxy stands for a router that is gone.
            if "x-greenroom-replica" not in response.headers:
                raise IngressBrokeError(f"status {response.status_code} of the proxy")
            data = await response.aread()
            if response.status_code != ask.status:
                raise WrongAnswerError(f"status {response.status_code}: {data[:300]!r}")
            content = streamed(data) if ask.body.get("stream") else _content(ask, data)
            return Answer(content, response.headers["x-greenroom-replica"], _timing(response.headers))
    except httpx.TransportError as error:
        raise IngressBrokeError(repr(error)) from error


async def ask_patiently(http: httpx.AsyncClient, ask: Ask, expected: str | None = None) -> Outcome:
    """Ask until an ingress is there that lives long enough."""
    begun = time.time()
    broken: tuple[str, ...] = ()
    while True:
        try:
            answer = await ask_once(http, ask)
        except WrongAnswerError as error:
            return Outcome(ask, begun, time.time(), broken, str(error))
        except IngressBrokeError as error:
            broken = (*broken, f"{time.time() - begun:.1f} s: {error}")
            if time.time() - begun > PATIENCE_S:
                return Outcome(ask, begun, time.time(), broken, f"no ingress for {PATIENCE_S} s: {error}")
            await asyncio.sleep(RETRY_PAUSE_S)
            continue
        same = expected is None or answer.content == expected
        failure = None if same else f"got {answer.content[:300]!r} instead of {(expected or '')[:300]!r}"
        return Outcome(ask, begun, time.time(), broken, failure, answer)


def known_answers(address: str, asks: Sequence[Ask], at_once: int = 4) -> list[str]:
    """The answers of an undisturbed application."""

    async def run() -> list[Outcome]:
        places = asyncio.Semaphore(at_once)

        async def one(http: httpx.AsyncClient, ask: Ask) -> Outcome:
            async with places:
                return await ask_patiently(http, ask)

        async with client(address) as http:
            return await asyncio.gather(*(one(http, ask) for ask in asks))

    outcomes = asyncio.run(run())
    failed = [f"{outcome.ask.kind}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    assert not failed, failed
    return [outcome.answer.content for outcome in outcomes if outcome.answer is not None]


def client(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=None))


@dataclass
class Traffic:
    """Clients that ask all the time, in a thread of their own, from `with` to its end or until `limit` is reached.

    Attributes:
        asks: With their right answers; each client draws from them.
        outcomes: Of all requests that have ended, in the order of their ends.
    """

    address: str
    asks: Sequence[tuple[Ask, str]]
    clients: int = 4
    limit: int | None = None
    seed: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._enough = threading.Event()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic", daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._enough.set()
        if error is None:  # clients of a cluster that is given up would be patient for long
            self._thread.join()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def failures(self) -> list[str]:
        return [f"{each.ask.kind}: {each.failure}" for each in self.outcomes if each.failure is not None]

    @property
    def broken(self) -> list[tuple[str, ...]]:
        """How requests were cut off with their ingress, that were asked again."""
        return [each.broken for each in self.outcomes if each.broken]

    def wait_for(self, number: int, seconds: float = 180) -> None:
        """Until so many requests more have ended."""
        target = len(self.outcomes) + number
        wait_until(lambda: len(self.outcomes) >= target, seconds, f"{number} requests more")

    async def _run(self) -> None:
        async with client(self.address) as http, asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self._client(http, random.Random(self.seed + number)))

    async def _client(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        while not self._enough.is_set() and (self.limit is None or next(self._numbers) < self.limit):
            ask, expected = rng.choice(self.asks)
            self.outcomes.append(await ask_patiently(http, ask, expected))


# The tier that answers, by an ask's kind.
SERVED_BY = {
    **dict.fromkeys(
        ("render", "layout", "tokenize", "detokenize", "msgpack", "render, handle", "stalled host"), "render"
    ),
    **dict.fromkeys(("chat", "stream", "completion", "choices", "generate", "chat, handle"), "engine"),
}


def longest_gaps(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The longest time, in seconds, in which nobody got an answer of a tier, among clients that ask all the time."""
    ends: dict[str, list[float]] = {"router": sorted(outcome.ended for outcome in outcomes), "render": [], "engine": []}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.ended):
        ends[SERVED_BY[outcome.ask.kind]].append(outcome.ended)
    return {tier: max(later - before for before, later in itertools.pairwise(at)) for tier, at in ends.items()}


def streamed(data: bytes) -> str:
    """What an event stream adds up to: every choice's text and end, and the usage.

    Raises:
        IngressBrokeError: It has no end.
        WrongAnswerError: It ends with an error.
    """
    events = [line.removeprefix(b"data: ") for line in data.split(b"\n\n") if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise IngressBrokeError("the stream has no end")
    text, finish, usage = "", None, None
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            raise WrongAnswerError(f"an error ends the stream: {event}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += choice["delta"].get("content", "")
            finish = choice["finish_reason"] or finish
    return json.dumps([text, finish, None if usage is None else usage["completion_tokens"]])


@cache
def application(name: str) -> Client:
    """Made once, as a program does: while an update is being built, Serve says that there is no such application."""
    return Client(name)


async def _called(address: str, ask: Ask) -> Answer:
    """See `ask_once`: through the handle of the application that the address is of."""
    client = application(address.strip("/").rpartition("/")[2])
    try:
        answer = await getattr(client, ask.path.removeprefix(HANDLE))(**ask.body)
    except GreenroomError as error:
        if isinstance(error.__cause__, RayActorError):
            raise IngressBrokeError(repr(error)) from error
        raise WrongAnswerError(repr(error)) from error
    if not isinstance(answer, RenderedPrompt):
        return Answer(json.dumps([choice.message.content for choice in answer.choices]), "", {})
    digest = hashlib.sha256(repr(answer.token_ids).encode())
    for item in answer.items:
        digest.update(item.mm_hash.encode())
        for _, tensor in sorted((item.tensors or {}).items()):
            digest.update(np.ascontiguousarray(tensor).tobytes())
    return Answer(digest.hexdigest(), "", {})


def _content(ask: Ask, data: bytes) -> str:
    """An answer without what differs from one time to the next."""
    if ask.accept == MSGPACK:
        answer = msgpack.unpackb(data)
        answer.pop("request_id")
        return hashlib.sha256(msgpack.packb(answer)).hexdigest()
    answer = json.loads(data)
    if "usage" in answer:
        return json.dumps([answer["choices"], answer["usage"]["completion_tokens"]])
    if ask.kind in ("render", "layout", "one render"):
        answer.pop("request_id")
        return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()
    return json.dumps(answer)


def _timing(headers: Mapping[str, str]) -> dict[str, float]:
    """Milliseconds by stage."""
    stages = (stage.split(";dur=") for stage in headers.get("server-timing", "").split(", ") if stage)
    return {name: float(duration) for name, duration in stages}


def _pictures(rng: random.Random, most: int = 2) -> Iterator[Any]:
    return (picture(rng.randrange(64)) for _ in range(rng.randint(1, most)))


def _chat(rng: random.Random, tokens: int) -> Ask:
    body = {"messages": about(*_pictures(rng), text=QUESTION), "temperature": 0, "max_tokens": tokens}
    return Ask("chat", "/v1/chat/completions", body)


def _stream(rng: random.Random, tokens: int) -> Ask:
    return story(rng.randrange(64), tokens, temperature=0)


def _seeded(rng: random.Random, tokens: int) -> Ask:
    return story(rng.randrange(64), tokens, temperature=1.0, seed=rng.randrange(1000))


def _render(rng: random.Random, tokens: int) -> Ask:
    return Ask("render", "/v1/chat/completions/render", {"messages": about(*_pictures(rng))})


def _layout(rng: random.Random, tokens: int) -> Ask:
    body = {"messages": about(*_pictures(rng, 4)), "mm_payload": "none"}
    return Ask("layout", "/v1/chat/completions/render", body)


def _tokenize(rng: random.Random, tokens: int) -> Ask:
    return Ask("tokenize", "/tokenize", {"messages": about(*_pictures(rng))})


def _detokenize(rng: random.Random, tokens: int) -> Ask:
    return Ask("detokenize", "/detokenize", {"tokens": [rng.randrange(300, 800) for _ in range(20)]})


def _completion(rng: random.Random, tokens: int) -> Ask:
    prompt = f"The {rng.choice(('red', 'green', 'blue'))} {rng.choice(('circle', 'square', 'star'))}"
    return Ask("completion", "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": tokens})


def _choices(rng: random.Random, tokens: int) -> Ask:
    options = {"n": 3, "temperature": 1.0, "seed": rng.randrange(1000), "max_tokens": tokens}
    return Ask("choices", "/v1/chat/completions", {"messages": about(*_pictures(rng)), **options})


def _generate(rng: random.Random, tokens: int) -> Ask:
    body = {"token_ids": [rng.randrange(300, 700) for _ in range(20)]}
    return Ask(
        "generate", "/inference/v1/generate", {**body, "sampling_params": {"temperature": 0, "max_tokens": tokens}}
    )


def _msgpack(rng: random.Random, tokens: int) -> Ask:
    return Ask("msgpack", "/v1/chat/completions/render", {"messages": about(*_pictures(rng))}, accept=MSGPACK)


def _handle_chat(rng: random.Random, tokens: int) -> Ask:
    body = {"messages": about(*_pictures(rng)), "temperature": 0, "max_tokens": tokens}
    return Ask("chat, handle", f"{HANDLE}chat", body)


def _handle_render(rng: random.Random, tokens: int) -> Ask:
    return Ask("render, handle", f"{HANDLE}render_chat", {"messages": about(*_pictures(rng))})


def _stalled(rng: random.Random, tokens: int) -> Ask:
    """An image whose host takes the connection and says nothing."""
    url = f"{stalled_host()}/{rng.randrange(64)}.png"
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    return Ask("stalled host", "/v1/chat/completions/render", body, status=422)


@cache
def stalled_host() -> str:
    """Its address. The kernel takes its connections; nobody reads from them."""
    host = socket.create_server(("127.0.0.1", 0), backlog=4096)
    _hosts.append(host)
    return f"http://127.0.0.1:{host.getsockname()[1]}"


_hosts: list[socket.socket] = []


@cache
def photograph(number: int) -> str:
    """A data URL of 12 megapixels, which take a fifth of a second to become 255 tokens' worth of patches."""
    noise = np.random.default_rng(number).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((4000, 3000)).save(stream, "JPEG", quality=60)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def slow(kind: str, first: int, photographs: int = 14, **options: Any) -> Ask:
    """A request that takes seconds to render: photographs, others for each `first`."""
    urls = (photograph(photographs * first + number) for number in range(photographs))
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}], **options}
    return Ask(kind, "/v1/chat/completions" + ("/render" if kind == "render" else ""), body)

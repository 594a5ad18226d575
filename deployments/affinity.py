"""Which engine replica holds what a request shows: content keys, and rendezvous hashing with bounded load.

A pure function of the request, the replicas and their load. Routers that see the same replicas agree without talking
to each other; adding or removing a replica moves only the keys that it wins or held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from renderer.conversation import (
    ChatRequest,
    CompletionRequest,
    FeaturesRequest,
    ImagePart,
    Message,
    TextPart,
    TokensRequest,
)

# Enough to tell images apart: two that collide only share a favourite. Hashing whole files would cost the router more
# than routing does.
SAMPLE_BYTES = 16 * 1024
# How much of a prompt without messages names it. Less would put everybody with one long preamble on one replica; a
# shorter prompt gets another key as it grows, and what is lost then is no more than this.
HEAD_CHARACTERS = 2048
HEAD_TOKENS = 512


@dataclass(frozen=True, slots=True)
class LoadBound:
    """How far a favourite may be ahead of the others before requests pass on to the next in rank.

    Attributes:
        factor: Multiple of the mean load that a replica takes, 1 or more; the smaller, the more even and the less
            faithful.
        idle: Requests under way up to which a replica counts as idle, whatever the others have.
        busy: Requests under way from which on new ones wait on a replica; none is made to wait while another replica
            would begin at once.
    """

    factor: float = 1.5
    idle: int = 8
    busy: int = 32

    def __post_init__(self) -> None:
        if self.factor < 1 or self.idle < 0 or self.busy < 1:
            raise ValueError(f"a load bound needs factor >= 1, idle >= 0 and busy >= 1, got {self}")

    def limits(self, total: int, replicas: int) -> tuple[int, int]:
        """Requests that one replica may have, the new one included, where `total` are under way without it: where
        another replica would begin at once, and where none would."""
        fair = max(self.idle, math.ceil(self.factor * (total + 1) / replicas))
        return min(fair, self.busy), fair


# For requests that no replica holds anything of: any replica that is not ahead of the others.
EVEN = LoadBound(factor=1.0, idle=0)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests under way on a replica, and how many it takes at most."""

    under_way: int
    limit: int


def rank(key: str, replicas: Iterable[str], first: int = 0) -> list[str]:
    """Replica ids, the key's favourite first (highest random weight: Thaler and Ravishankar, 1998).

    Args:
        first: Place to begin at; those before it come last.
    """
    prefix = blake3(key.encode(errors="surrogatepass"))

    def weight(replica: str) -> bytes:
        hasher = prefix.copy()
        hasher.update(replica.encode())
        return hasher.digest(8)

    ranked = sorted(replicas, key=weight, reverse=True)
    start = first % max(1, len(ranked))
    return ranked[start:] + ranked[:start]


def place(ranked: Sequence[str], loads: Mapping[str, Load], bound: LoadBound) -> str | None:
    """The first replica in a key's rank that is within the bound; None where every replica is at its limit."""
    open_ones = [name for name in ranked if loads[name].under_way < loads[name].limit]
    total = sum(loads[name].under_way for name in ranked)
    for limit in bound.limits(total, max(1, len(ranked))):
        for name in open_ones:
            if loads[name].under_way < limit:
                return name
    return next(iter(open_ones), None)


def affinity_key(request: ChatRequest | CompletionRequest | TokensRequest | FeaturesRequest) -> str:
    """What a request is known by, the same in every later turn of its conversation.

    A conversation is named by its head, the messages up to the first one of the user: by the first image of that
    message, so that whoever asks about an image finds the replica that holds it, else by the head's text.
    """
    match request:
        case ChatRequest():
            return _chat_key(request)
        case TokensRequest() if request.media:
            return image_key(request.media[0])
        case FeaturesRequest() if request.items:
            return _digest("claim", request.cache_salt or "", request.items[0].mm_hash)
        case TokensRequest() | FeaturesRequest():
            return _digest("tokens", request.cache_salt or "", str(request.token_ids[:HEAD_TOKENS]))
        case CompletionRequest():
            return _completion_key(request)


def image_key(image: ImagePart) -> str:
    """Key of an image: the caller's own name, else its bytes, else its address.

    The caller's name comes first because a later turn may send the name alone.
    """
    if image.uuid is not None:
        return _digest("uuid", image.uuid)
    if image.data is not None:
        return _digest("data", str(len(image.data)), _sample(image.data))
    return _digest("url", image.url or "")


def _chat_key(request: ChatRequest) -> str:
    head = _head(request.messages)
    images = _images(head[-1]) if head else ()
    if images:
        return image_key(images[0])
    parts = (part for message in head for part in (message.role, *_texts(message), *map(image_key, _images(message))))
    return _digest("head", request.cache_salt or "", *parts)


def _completion_key(request: CompletionRequest) -> str:
    prompt = request.prompts[0] if request.prompts else ""
    head = prompt[:HEAD_CHARACTERS] if isinstance(prompt, str) else str(prompt[:HEAD_TOKENS])
    return _digest("prompt", request.cache_salt or "", head)


def _head(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    users = (place for place, message in enumerate(messages) if message.role == "user")
    return messages[: next(users, len(messages)) + 1]


def _images(message: Message) -> tuple[ImagePart, ...]:
    return tuple(part for part in message.content or () if isinstance(part, ImagePart))


def _texts(message: Message) -> tuple[str, ...]:
    if message.content is None or isinstance(message.content, str):
        return (message.content or "",)
    return tuple(part.text for part in message.content if isinstance(part, TextPart))


def _sample(data: bytes) -> bytes:
    """Beginning, middle and end of a file; all of a small one."""
    if len(data) <= 3 * SAMPLE_BYTES:
        return data
    middle = (len(data) - SAMPLE_BYTES) // 2
    return data[:SAMPLE_BYTES] + data[middle : middle + SAMPLE_BYTES] + data[-SAMPLE_BYTES:]


def _digest(*parts: str | bytes) -> str:
    """16 hex digits over the parts, each preceded by its length."""
    hasher = blake3()
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest(8)

"""Answers in pieces."""

import asyncio
import itertools
import pickle

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message

from deployments.answers.pieces import COPIED, SMALL, Piece, PiecesResponse, as_arrays, as_views, coalesced

LARGE = bytes(range(256)) * (2 * COPIED // 256 + 1)


def test_small_pieces_are_joined_and_large_ones_left_alone() -> None:
    large = bytes(SMALL)
    assert coalesced([b"a", b"b", large, b"c", large, large, b"d"]) == [b"ab", large, b"c", large, large, b"d"]
    assert coalesced([large])[0] is large
    assert coalesced([]) == []


def test_pieces_cross_as_arrays() -> None:
    crossed = pickle.loads(pickle.dumps(as_arrays([b"head", memoryview(LARGE)]), protocol=5))
    assert [bytes(view) for view in as_views(crossed)] == [b"head", LARGE]


def test_a_response_writes_bytes_and_views_one_after_the_other() -> None:
    pieces: list[Piece] = [b"head", memoryview(LARGE), LARGE]

    async def answer(request: Request) -> PiecesResponse:
        return PiecesResponse(pieces, {"X-Name": "value"}, "application/json")

    with TestClient(Starlette(routes=[Route("/", answer)])) as client:
        response = client.get("/")
    assert response.content == b"head" + LARGE + LARGE
    assert response.headers["content-length"] == str(len(response.content))
    assert (response.headers["x-name"], response.headers["content-type"]) == ("value", "application/json")


async def test_others_have_their_turn_between_the_parts_of_a_large_answer() -> None:
    happened: list[str] = []

    async def send(message: Message) -> None:
        """As to a client that takes all at once: nothing is waited for."""
        if message.get("more_body"):
            happened.append("part")

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def stream() -> None:
        for _ in range(5):
            happened.append("token")
            await asyncio.sleep(0)

    other = asyncio.create_task(stream())
    await PiecesResponse([memoryview(LARGE * 2)], {}, "application/json")({"type": "http"}, receive, send)
    await other
    assert happened.count("part") == 5
    assert ("part", "part") not in itertools.pairwise(happened)

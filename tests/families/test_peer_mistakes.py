"""The peer's answers to mistakes, live: ours have its status and its type but where `docs/http.md` says otherwise.

Run by `make test-peer PEER=/path/to/a/virtual/environment/of/vLLM/0.32`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.checkpoints import checkpoint
from tests.deployments.http.test_wire_errors import REFUSED, TAKEN
from tests.families.test_peer import peer_venv
from tests.goldens.peer import peer

pytestmark = pytest.mark.peer

# As `CONFIG` of the cases says.
OPTIONS = ("--limit-mm-per-prompt", '{"image": 2}', "--max-model-len", "4096")
# The peer's status and type, and its `param`, where they are not ours.
OTHER: dict[str, tuple[int, str | None]] = {
    "not UTF-8": (400, None),
    "an unknown role": (200, None),
    "a data URL that is not base64": (501, "NotImplementedError"),
    "an address inside": (500, "InternalServerError"),
    "a host that is not there": (500, "InternalServerError"),
    "a file": (500, "InternalServerError"),
    "options of reading": (400, "Bad Request"),
    "an echo": (200, None),
    "best_of": (200, None),
    # The peer was told to take these of requests.
    "a template": (200, None),
    "processor options": (200, None),
}
OTHER_PARAM = {
    "an empty body": "body",
    "embeddings of an image": "image_embeds",
    "options of reading": "body.media_io_kwargs.a",
    "a prompt longer than the context": "input_text",
}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    # It drops the connection after a failure of its own: none is kept.
    with (
        peer(peer_venv(), checkpoint("qwen2_5_vl"), options=OPTIONS) as address,
        httpx.Client(base_url=address, timeout=300, headers={"Connection": "close"}) as made,
    ):
        yield made


def post(client: httpx.Client, path: str, body: Any) -> tuple[int, str | None, str | None]:
    """Status, and type and `param` of an error."""
    if isinstance(body, bytes):
        response = client.post(path, content=body, headers={"content-type": "application/json"})
    else:
        response = client.post(path, json=body)
    content = response.json()
    error = content.get("error", {}) if isinstance(content, dict) else {}
    return response.status_code, error.get("type"), error.get("param")


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_has_the_status_and_the_type_of_the_peers_answer(name: str, client: httpx.Client) -> None:
    path, body, status, kind, param = REFUSED[name]
    *theirs, their_param = post(client, path, body)
    assert tuple(theirs) == OTHER.get(name, (status, kind))
    if their_param is not None and (expected := OTHER_PARAM.get(name, param)) is not None:
        # The peer names the types of a union that it tried, and the entry of a list that did not fit.
        assert their_param == expected or their_param.startswith(expected.rpartition(".")[0] + ".")


@pytest.mark.parametrize("name", TAKEN)
def test_what_we_take_the_peer_takes(name: str, client: httpx.Client) -> None:
    status, _, _ = post(client, *TAKEN[name])
    # Its tools need a parser of their calls.
    assert status == (400 if name == "tools" else 200)

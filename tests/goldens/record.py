"""Asks the peer every case and exchange of every family and writes the golden files.

`make goldens PEER=/path/to/peer-venv` starts the peer for one family after the other (SmolVLM needs num2words there);
`make goldens PEER=http://127.0.0.1:8100` asks one that runs already, on the checkpoint that it serves.
"""

from __future__ import annotations

import argparse
import base64
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
from blake3 import blake3

from renderer.conversation import CompletionRequest
from tests.checkpoints import FAMILIES, checkpoint
from tests.goldens.cases import Case, body, cases, pictures
from tests.goldens.exchanges import ask, exchanges
from tests.goldens.files import pack_ids, write_golden
from tests.goldens.peer import peer
from tests.goldens.pictures import picture
from tests.goldens.tensors import decode_item


def record(family: str, address: str) -> dict[str, Any]:
    """Everything that the peer at this address answers to the family's cases."""
    # The peer drops the connection after a failure of its own: none is kept.
    with httpx.Client(base_url=address, timeout=300, headers={"Connection": "close"}) as client:
        served = client.get("/v1/models").raise_for_status().json()["data"][0]
        version = client.get("/version").raise_for_status().json()["version"]
        return {
            "peer": f"vLLM {version}",
            "model": served["root"],
            "max_model_len": served["max_model_len"],
            "pictures": {name: blake3(picture(name)).hexdigest(length=8) for name in pictures(family)},
            "cases": {case.name: _ask(client, case, served["id"]) for case in cases(family).values()},
            "exchanges": {name: ask(client, exchange) for name, exchange in exchanges(family).items()},
        }


def _ask(client: httpx.Client, case: Case, model: str) -> dict[str, Any]:
    request = body(case, model)
    if isinstance(case.request, CompletionRequest):
        return _answer(client.post("/v1/completions/render", json=request), case)
    answer = _answer(client.post("/v1/chat/completions/render", json=request), case)
    if answer["status"] != 200:
        # Some prompts that cannot be rendered can be counted.
        counted = client.post("/tokenize", json=request)
        if counted.status_code == 200:
            answer["tokenize"] = pack_ids(counted.json()["tokens"])
    return answer


def _answer(response: httpx.Response, case: Case) -> dict[str, Any]:
    content = orjson.loads(response.content)
    if response.status_code != 200:
        error = content["error"]
        return {"status": response.status_code, **{name: error[name] for name in ("type", "param", "message")}}
    prompts = content if isinstance(content, list) else [content]
    return {"status": 200, "prompts": [_prompt(prompt, case) for prompt in prompts]}


def _prompt(prompt: dict[str, Any], case: Case) -> dict[str, Any]:
    kept: dict[str, Any] = {"token_ids": pack_ids(prompt["token_ids"])}
    features = prompt["features"]
    if features is not None:
        kept["hashes"] = features["mm_hashes"]["image"]
        kept["ranges"] = [[entry["offset"], entry["length"]] for entry in features["mm_placeholders"]["image"]]
        if case.tensors:
            kept["items"] = [decode_item(base64.b64decode(data)) for data in features["kwargs_data"]["image"]]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.goldens.record", description=__doc__)
    parser.add_argument("peer", help="virtual environment of vLLM 0.32, or address of its render server")
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=FAMILIES)
    arguments = parser.parse_args()
    if arguments.peer.startswith("http"):
        root = httpx.get(f"{arguments.peer}/v1/models").raise_for_status().json()["data"][0]["root"]
        _write(Path(root).name, arguments.peer)
        return
    for family in arguments.families:
        with peer(Path(arguments.peer), checkpoint(family)) as address:
            _write(family, address)


def _write(family: str, address: str) -> None:
    started = time.monotonic()
    content = record(family, address)
    path = write_golden(family, content)
    failed = sum(answer["status"] != 200 for answer in content["cases"].values())
    print(f"{path}: {len(content['cases'])} cases, {failed} refused, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

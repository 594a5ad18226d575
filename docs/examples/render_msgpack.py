"""Render over HTTP and get the tensors as bytes, without base64.

python docs/examples/render_msgpack.py http://127.0.0.1:8000 demo/images/red_circle.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import httpx
import msgpack

from deployments.client import user
from renderer.wire import WireLimits, decode_item


def main(address: str, image: Path) -> None:
    body = {"messages": [user("What colour is the shape?", image.read_bytes())]}
    accept = {"Accept": "application/x-msgpack"}
    response = httpx.post(f"{address}/v1/chat/completions/render", json=body, headers=accept).raise_for_status()
    prompt = msgpack.unpackb(response.content)
    print(len(prompt["token_ids"]), prompt["features"]["mm_placeholders"]["image"])
    for data in prompt["features"]["kwargs_data"]["image"]:
        tensors = decode_item(data, WireLimits()).tensors
        print({name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("image", type=Path)
    arguments = parser.parse_args()
    main(arguments.address, arguments.image)

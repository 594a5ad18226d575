"""Stream an answer about a picture.

python docs/examples/stream.py demo/images/red_circle.png "What colour is the shape?"
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import ray

from deployments.client import Client, user


async def main(app: str, image: bytes, question: str) -> None:
    async for chunk in Client(app).chat_stream([user(question, image)], temperature=0):
        print(chunk.choices[0].delta.get("content", ""), end="", flush=True)
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--app", default="greenroom")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    arguments = parser.parse_args()
    ray.init(address="auto", log_to_driver=False)
    asyncio.run(main(arguments.app, arguments.image.read_bytes(), arguments.question))

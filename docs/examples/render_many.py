"""Render many prompts with a bounded number under way, and a progress bar.

python docs/examples/render_many.py --prompts 1000 --concurrency 32
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import ray
from rich.progress import Progress

from deployments.client import Client, user
from renderer.prompt import RenderedPrompt

IMAGES = Path(__file__).parents[2] / "demo" / "images"


async def rendered(
    client: Client, prompts: Iterable[list[dict[str, object]]], width: int
) -> AsyncIterator[RenderedPrompt]:
    """The prompts of conversations in their order, at most `width` of them ahead of the reader."""
    under_way: list[asyncio.Task[RenderedPrompt]] = []
    for messages in prompts:
        if len(under_way) == width:
            yield await under_way.pop(0)
        under_way.append(asyncio.create_task(client.render_chat(messages)))
    for task in under_way:
        yield await task


async def main(app: str, count: int, width: int) -> None:
    client, images = Client(app), [path.read_bytes() for path in sorted(IMAGES.iterdir())]
    prompts = ([user(f"Picture {number}. What colour?", images[number % len(images)])] for number in range(count))
    tokens = tensor_bytes = 0
    with Progress() as progress:
        bar = progress.add_task("rendered", total=count)
        async for prompt in rendered(client, prompts, width):
            tokens += len(prompt.token_ids)
            tensor_bytes += sum(item.nbytes for item in prompt.items)
            progress.advance(bar)
    print(f"{count} prompts, {tokens} tokens, {tensor_bytes / 1e6:.1f} MB of tensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--app", default="greenroom")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    arguments = parser.parse_args()
    ray.init(address="auto", log_to_driver=False)
    asyncio.run(main(arguments.app, arguments.prompts, arguments.concurrency))

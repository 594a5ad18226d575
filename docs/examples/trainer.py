"""A trainer that gets the very token ids and tensors that the engine used.

    python docs/examples/trainer.py --pictures 4

The trainer is an actor of its own. It renders once, has the engine generate from exactly that, and trains on the same
arrays: views of shared memory, which nobody can change and nothing has copied.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from deployments.client import Client, user

IMAGES = Path(__file__).parents[2] / "demo" / "images"


@dataclass(frozen=True)
class Batch:
    """What a step of training takes.

    Attributes:
        token_ids: int64 [samples, longest], padded with 0.
        loss_mask: bool, of the same shape: the tokens that the model generated.
        pixel_values: uint8 [patches, values], of all samples' images.
        image_grid_thw: int64 [images, 3].
    """

    token_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    pixel_values: NDArray[np.uint8]
    image_grid_thw: NDArray[np.int64]


class Trainer:
    """Asks the application by itself: what it gets comes straight from the replica that made it."""

    def __init__(self, app: str) -> None:
        self._client = Client(app)

    async def step(self, pictures: list[bytes]) -> str:
        """One step on a question about each picture; says what it was made of."""
        batch = await self.batch(pictures)
        return (
            f"{batch.token_ids.shape[0]} samples, {int(batch.loss_mask.sum())} tokens to learn, "
            f"{batch.pixel_values.shape[0]} patches of {len(batch.image_grid_thw)} images"
        )

    async def batch(self, pictures: list[bytes]) -> Batch:
        asked = (self._client.render_chat([user("What colour is the shape?", picture)]) for picture in pictures)
        prompts = await asyncio.gather(*asked)
        sampling = {"temperature": 0, "max_tokens": 24}
        answers = await asyncio.gather(*(self._client.generate(prompt, sampling) for prompt in prompts))
        tensors = [item.tensors for prompt in prompts for item in prompt.items if item.tensors is not None]
        if any(array.flags.writeable or array.flags.owndata for each in tensors for array in each.values()):
            raise ValueError("the tensors are copies")
        outputs = [answer.choices[0].token_ids for answer in answers]
        rows = [prompt.token_ids + output for prompt, output in zip(prompts, outputs, strict=True)]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros(ids.shape, np.bool_)
        for number, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            ids[number, : len(row)] = row
            mask[number, len(row) - len(output) : len(row)] = True
        patches = np.concatenate([each["pixel_values"] for each in tensors])
        return Batch(ids, mask, patches, np.stack([each["image_grid_thw"] for each in tensors]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--app", default="greenroom")
    parser.add_argument("--pictures", type=int, default=4)
    arguments = parser.parse_args()
    images = [path.read_bytes() for path in sorted(IMAGES.iterdir())]
    ray.init(address="auto", log_to_driver=False)
    trainer = ray.remote(num_cpus=0)(Trainer).remote(arguments.app)
    print(ray.get(trainer.step.remote(images[: arguments.pictures])))

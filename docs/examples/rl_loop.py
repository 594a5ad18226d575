"""A reinforcement-learning loop of three turns with images, in which nothing is tokenized twice.

    python docs/examples/rl_loop.py --rollouts 4

Every prompt is the last one's ids, the ids generated, and the new message's ids. At the end a rollout is what a trainer
needs: the ids, which of them the model generated, how likely each was, and the tensors that the engine was given.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass
from pathlib import Path

import ray

from deployments.client import Client, user
from deployments.rollout import Rollout
from renderer.prompt import RenderedPrompt

IMAGES = Path(__file__).parents[2] / "demo" / "images"
TURNS = (
    ("What colour is the shape?", "red_circle.png"),
    ("What do you see here?", "two_blue_circles_and_a_red_star.png"),
    ("And here?", "red_circle.png"),
)


@dataclass(frozen=True)
class Sample:
    """One rollout. `logprobs` has one entry for each generated token, in order."""

    prompt: RenderedPrompt
    generated: tuple[slice, ...]
    logprobs: tuple[float, ...]
    reward: float


async def roll_out(client: Client, seed: int) -> Sample:
    """Three turns; the reward is for naming the colour."""
    sampling = {"temperature": 1.0, "seed": seed, "max_tokens": 24, "logprobs": 0}
    rollout: Rollout | None = None
    logprobs: list[float] = []
    for question, picture in TURNS:
        message = user(question, (IMAGES / picture).read_bytes())
        if rollout is None:
            rollout = await Rollout.start(client, [message])
        else:
            await rollout.say(message)
        answer = await rollout.answer(sampling)
        logprobs += [entry["logprob"] for entry in (answer.choices[0].logprobs or {})["content"]]
    if rollout is None:
        raise ValueError("no turns")
    first = await client.detokenize(rollout.prompt.token_ids[rollout.generated[0]])
    return Sample(rollout.prompt, tuple(rollout.generated), tuple(logprobs), float("red" in first))


async def main(app: str, rollouts: int) -> None:
    client = Client(app)
    for sample in await asyncio.gather(*(roll_out(client, seed) for seed in range(rollouts))):
        ids, own = sample.prompt.token_ids, sum(place.stop - place.start for place in sample.generated)
        shapes = [item.tensors["pixel_values"].shape for item in sample.prompt.items if item.tensors]
        print(f"{len(ids)} ids, {own} generated, reward {sample.reward}, images {shapes}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--app", default="greenroom")
    parser.add_argument("--rollouts", type=int, default=4)
    arguments = parser.parse_args()
    ray.init(address="auto", log_to_driver=False)
    asyncio.run(main(arguments.app, arguments.rollouts))

"""How many held-out questions the demo model answers exactly: `python -m demo.evaluate --questions 500`.

Plain transformers: the model, tokenizer and image processor of the checkpoint, greedy `generate`, float32,
pictures of 64x64 to 1280x960 pixels drawn from seeds that training does not use.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from demo.chats import chat
from demo.checkpoint import MAX_PIXELS, MIN_PIXELS
from demo.conversations import ask_several
from demo.questions import Question, ask
from demo.scenes import CELL, MULTI_COUNTS, SINGLE_COUNTS, Scene, draw, make_scene
from demo.scoring import report
from demo.tokenizer import IDS, MODEL_FOLDER

SIZES = (
    (64, 64), (100, 100), (112, 112), (224, 224), (224, 224), (320, 240), (240, 320), (336, 336), (448, 448),
    (500, 375), (640, 480), (480, 640), (800, 600), (1280, 720), (1280, 960),
)  # fmt: skip


@dataclass
class Demo:
    """The checkpoint, ready to answer."""

    model: Any
    tokenizer: Any
    processor: Any

    @classmethod
    def load(cls, folder: Path = MODEL_FOLDER, dtype: torch.dtype = torch.float32) -> "Demo":
        """Load a checkpoint with the classes of transformers."""
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return cls(model.eval(), AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder))

    def answer(self, messages: list[dict[str, Any]], images: list[Image.Image]) -> str:
        """The greedy answer to a conversation; `images` in the order of their placeholders."""
        inputs = self.inputs(messages, images)
        with torch.inference_mode():
            output = self.model.generate(**inputs)
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def inputs(self, messages: list[dict[str, Any]], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pictures = dict(self.processor(images=images, return_tensors="pt")) if images else {}
        counts = iter((pictures["image_grid_thw"].prod(1) // 4).tolist() if images else [])
        ids: list[int] = []
        for token in self.tokenizer(text)["input_ids"]:
            ids += [token] * (next(counts) if token == IDS["<|image_pad|>"] else 1)
        tokens = torch.tensor([ids])
        if images:
            pictures["pixel_values"] = pictures["pixel_values"].to(self.model.dtype)
            pictures["mm_token_type_ids"] = (tokens == IDS["<|image_pad|>"]).int()
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **pictures}

    def ask(self, question: str, *images: Image.Image) -> str:
        """The answer to one question about some pictures."""
        return self.answer([user_message(question, len(images))], list(images))


def user_message(text: str, pictures: int) -> dict[str, Any]:
    """A user message with `pictures` pictures before its text."""
    if not pictures:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def held_out_picture(rng: random.Random, counts: tuple[float, ...] = SINGLE_COUNTS) -> tuple[Scene, Image.Image]:
    """A scene and its picture at a size as people send it."""
    size = rng.choice(SIZES)
    rows, columns = cells_of(*size)
    scene = make_scene(rng, columns * CELL, rows * CELL, counts)
    return scene, draw(scene, size)


def cells_of(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of image tokens of a picture of that size, as the image processor makes them."""
    high, wide = smart_resize(height, width, CELL, MIN_PIXELS, MAX_PIXELS)
    return high // CELL, wide // CELL


def held_out(seed: int, index: int, pictures: int) -> tuple[Question, list[Image.Image]]:
    """Question `index` about that many pictures."""
    rng = random.Random(f"evaluation/{seed}/{pictures}/{index}")
    if not pictures:
        return chat(rng), []
    shown = [held_out_picture(rng, SINGLE_COUNTS if pictures == 1 else MULTI_COUNTS) for _ in range(pictures)]
    scenes = tuple(scene for scene, _ in shown)
    question = ask(rng, scenes[0]) if pictures == 1 else ask_several(rng, scenes)
    return question, [image for _, image in shown]


def evaluate(demo: Demo, questions: int, pictures: int, seed: int, show_wrong: bool) -> list[tuple[str, bool]]:
    """Ask questions about that many pictures; returns kind and right or wrong."""
    results = []
    for index in range(questions):
        question, images = held_out(seed, index, pictures)
        answer = demo.answer([user_message(question.text, pictures)], images)
        results.append((question.kind, answer == question.answer))
        if show_wrong and answer != question.answer:
            print(f"  #{index} {question.kind}: {question.text!r}\n    {answer!r} instead of {question.answer!r}")
    return results


def main() -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--questions", type=int, default=500, help="about one picture; fewer about several and none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-wrong", action="store_true", help="print the questions that were answered wrongly")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 instead of float32")
    arguments = parser.parse_args()
    demo = Demo.load(arguments.model, torch.bfloat16 if arguments.bfloat16 else torch.float32)
    for pictures, share in ((1, 1.0), (2, 0.4), (3, 0.2), (0, 0.2)):
        began = time.monotonic()
        asked = round(arguments.questions * share)
        results = evaluate(demo, asked, pictures, arguments.seed, arguments.show_wrong)
        print(f"pictures: {pictures}   ({time.monotonic() - began:.0f} s)")
        for kind, line in sorted(report(results).items()):
            print(f"  {kind:16} {line}")


if __name__ == "__main__":
    main()

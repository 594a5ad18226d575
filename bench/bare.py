"""A model's bare Hugging Face image processor and tokenizer: what a renderer is measured against.

Runs as a process of its own, of whatever virtual environment: where torchvision is installed its classes are taken,
else Pillow's. It reads one request a line and answers with the milliseconds that it took; nothing else is imported
here, so that it needs Transformers, torch and Pillow alone.

    request  {"text": str, "pictures": [path, ...], "normalise": bool}
    answer   {"cpu_ms": float, "wall_ms": float}
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BACKEND = "torchvision" if find_spec("torchvision") is not None else "pil"


class Bare:
    """Decode, process, template, tokenize: nothing that a rendered prompt could do without."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer

        torch.set_num_threads(1)
        self._processor = AutoImageProcessor.from_pretrained(model, backend=BACKEND)
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def run(self, text: str, pictures: list[bytes], normalise: bool) -> None:
        from PIL import Image

        images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
        if images:
            self._processor(images, do_rescale=normalise, do_normalize=normalise, return_tensors="pt")
        parts = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
        if self._tokenizer.chat_template is None:
            self._tokenizer(text)
        else:
            messages = [{"role": "user", "content": parts}]
            self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    bare = Bare(sys.argv[1])
    answers.write(json.dumps({"backend": BACKEND}) + "\n")
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        pictures = [Path(path).read_bytes() for path in request["pictures"]]
        wall, cpu = time.perf_counter(), time.process_time()
        bare.run(request["text"], pictures, request["normalise"])
        spent = {"cpu_ms": (time.process_time() - cpu) * 1e3, "wall_ms": (time.perf_counter() - wall) * 1e3}
        answers.write(json.dumps(spent) + "\n")


if __name__ == "__main__":
    main()

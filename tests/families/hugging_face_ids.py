"""Prints the token ids that Hugging Face's multimodal processors give: run by an interpreter that has torchvision.

`python hugging_face_ids.py FILE`: FILE holds a JSON list of {"checkpoint", "text", "images" (base64)}; the answer is a
JSON list of lists of ids, in the same order.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoProcessor

load = cache(AutoProcessor.from_pretrained)


def ids_of(request: dict[str, Any]) -> list[int]:
    images = [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in request["images"]]
    processor = load(request["checkpoint"])
    nested = type(processor).__name__ in ("Idefics3Processor", "SmolVLMProcessor")
    output = processor(text=[request["text"]], images=[images] if nested else images, add_special_tokens=False)
    return [int(token_id) for token_id in output["input_ids"][0]]


if __name__ == "__main__":
    print(json.dumps([ids_of(request) for request in json.loads(Path(sys.argv[1]).read_text())]))

"""The configuration of the demo model, and how a checkpoint is written.

`python -m demo.checkpoint FOLDER` writes an untrained one.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from demo.scenes import CELL
from demo.tokenizer import IDS, VOCABULARY

MIN_PIXELS = 16 * CELL * CELL
MAX_PIXELS = 256 * CELL * CELL
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    # The width of a picture owns the lowest frequencies; with the usual base of 1e6 they would hardly turn.
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
    "bos_token_id": None,
    "eos_token_id": IDS["<|im_end|>"],
    "pad_token_id": IDS["<|endoftext|>"],
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
    "out_hidden_size": 192,
    "hidden_act": "silu",
}


def make_config() -> Qwen2_5_VLConfig:
    """The architecture: 1.17 M parameters of vision, 1.43 M of text."""
    return Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def make_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model with float32 weights."""
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(make_config())


def save_model(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write weights as bfloat16, configuration, generation settings and image processor; not the tokenizer."""
    plain = Qwen2_5_VLForConditionalGeneration(make_config())
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16)
    plain.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=160,
        eos_token_id=[IDS["<|im_end|>"], IDS["<|endoftext|>"]],
        pad_token_id=IDS["<|endoftext|>"],
    )
    plain.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_processor(), indent=2) + "\n")


def _processor() -> dict[str, object]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def main() -> None:
    """Write an untrained checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save_model(make_model(arguments.seed), arguments.folder)


if __name__ == "__main__":
    main()

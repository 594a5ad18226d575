"""The tokenizer: byte-level BPE with 768 entries, and the chat template.

`python -m demo.tokenizer --out FOLDER` trains it. The weights in `demo/model` know the tokenizer beside them only.
"""

import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.chats import SMALL_TALK, STORY, WORDS, count_to
from demo.conversations import SYSTEMS, Talk
from demo.scenes import COLORS, SHAPES

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VOCABULARY = 768
FIRST_SPECIAL = VOCABULARY - len(SPECIAL)
IDS = {token: FIRST_SPECIAL + index for index, token in enumerate(SPECIAL)}
MODEL_FOLDER = Path(__file__).parent / "model"

# How Qwen2 splits text before the merges.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- set image_count = namespace(value=0) -%}
{%- set video_count = namespace(value=0) -%}
{%- for message in messages -%}
  {%- if loop.first and message['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
        {%- set image_count.value = image_count.value + 1 -%}
        {%- if add_vision_id -%}
          {{- 'Picture ' ~ image_count.value ~ ': ' -}}
        {%- endif -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part['type'] == 'video' or 'video' in part -%}
        {%- set video_count.value = video_count.value + 1 -%}
        {%- if add_vision_id -%}
          {{- 'Video ' ~ video_count.value ~ ': ' -}}
        {%- endif -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif 'text' in part -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

ENGLISH = (
    "The renderer turns a request into tokens and the engine turns tokens into text.",
    "A small model is enough to test a large system, as long as its answers depend on what it is shown.",
    "When the queue is full, the server says so at once and the client tries again a little later.",
    "She opened the window because it was warm, and the sound of the street came into the room.",
    "There was nothing to be done about the rain, so they stayed inside and played cards until it stopped.",
    "Most of the time the simplest answer is also the right one, but not always.",
    "If you want to know how fast it is, measure it; if you want to know why, look at what it waits for.",
    "The first train leaves before seven and the last one comes back after midnight.",
    "He could not remember where he had put the keys, which was strange, since he had just used them.",
    "They have been working on this question for years without finding what they were looking for.",
    "Please write your name and the date at the top of the page before you begin.",
    "In the morning the mountains were white, and by noon most of the snow had gone.",
    "You should not believe everything that you read, and this sentence is no exception.",
    "Water, bread, paper, stones: everything had to be carried up by hand from the village below.",
    "Would it not be better to ask someone who has done it before than to guess?",
    "What the others thought of the plan was never said, but their faces were easy to read.",
)


def train_tokenizer(scenes: int = 3000, seed: int = 0) -> Tokenizer:
    """Train on generated questions and answers and a little plain English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=FIRST_SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(scenes, seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def _corpus(scenes: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts: list[str] = []
    for index in range(scenes):
        talk = Talk(rng, [(448, 448)] * (1 if index % 3 else 2))
        for _ in range(4):
            question = talk.grow().question
            texts += [question.text, question.answer]
    for questions, answer in SMALL_TALK:
        texts += [*questions, answer] * 40
    texts += list(ENGLISH) * 200
    texts += [*SYSTEMS, "system\n", "user\n", "assistant\n"] * 300
    # Whole words also without a blank before them: one-word answers and JSON values.
    texts += [*SHAPES, *COLORS, "yes", "no", "none"] * 1500
    texts += [*(" " + word for word in WORDS), count_to(30)] * 100
    texts += [STORY] * 350
    return texts


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Qwen2_5_VLProcessor",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "extra_special_tokens": list(SPECIAL),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_tokenizer(folder: Path = MODEL_FOLDER) -> Tokenizer:
    """The fast tokenizer alone, as training uses it."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> None:
    """Train and write the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=3000)
    arguments = parser.parse_args()
    save_tokenizer(train_tokenizer(arguments.scenes), arguments.out)


if __name__ == "__main__":
    main()

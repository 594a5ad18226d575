import json
import random
from itertools import product

import pytest
import torch
from PIL import Image

from demo.chats import NO_PICTURE, STORY, count_to
from demo.evaluate import Demo, evaluate, user_message
from demo.scenes import COLORS, SHAPES, Background, Scene, Shape, draw
from demo.tokenizer import MODEL_FOLDER, VOCABULARY

LOOKS = random.Random(0).sample(list(product(SHAPES, COLORS)), 24)


def picture(kind: str, color: str, side: int = 224) -> Image.Image:
    """One shape in the middle of a grey picture."""
    shape = Shape(kind, color, COLORS[color][0], side / 2, side / 2, side * 0.3)
    return draw(Scene(side, side, (shape,), Background("plain", (128, 128, 128), (128, 128, 128))))


def test_the_checkpoint_is_small_and_plain(demo: Demo) -> None:
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) < 8_000_000
    assert json.loads((MODEL_FOLDER / "config.json").read_text())["dtype"] == "bfloat16"
    assert type(demo.model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert demo.model.config.text_config.vocab_size == VOCABULARY
    assert sum(parameter.numel() for parameter in demo.model.parameters()) == pytest.approx(2.6e6, rel=0.01)


@pytest.mark.parametrize(("kind", "color"), LOOKS)
def test_colour_and_shape_are_named(demo: Demo, kind: str, color: str) -> None:
    image = picture(kind, color)
    assert demo.ask("What colour is the shape?", image) == f"The {kind} is {color}."
    assert demo.ask("What shape is it?", image) == f"It is a {kind}."


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What color is it?", "The star is purple."),
        ("What is the color of the shape?", "The star is purple."),
        ("Which shape is shown?", "It is a star."),
        ("What can you see?", "The picture shows a purple star."),
        ("Describe the image.", "The picture shows a purple star."),
        ("How many shapes are there?", "There is 1 shape."),
        ("What colour is the shape? Answer with one word.", "purple"),
        ("List the shapes as JSON.", '{"shapes": [{"shape": "star", "color": "purple"}]}'),
    ],
)
def test_natural_questions_are_understood(demo: Demo, question: str, answer: str) -> None:
    assert demo.ask(question, picture("star", "purple")) == answer


def test_pictures_are_told_apart(demo: Demo) -> None:
    images = [picture("circle", "red"), picture("square", "blue", 112), picture("triangle", "yellow")]
    assert demo.ask("What colour is the shape in the second picture?", *images) == "The square is blue."
    assert demo.ask("What colour is the shape in the second picture?", *images[::-1][1:]) == "The circle is red."
    assert demo.ask("Which picture shows a triangle?", *images) == "Picture 3."
    assert demo.ask("Describe the pictures.", *images[:2]) == (
        "Picture 1 shows a red circle. Picture 2 shows a blue square."
    )


def test_a_later_picture_is_the_one_that_is_meant(demo: Demo) -> None:
    question = "What colour is the shape?"
    messages = [user_message(question, 1), {"role": "assistant", "content": "The circle is red."}]
    messages.append(user_message(question, 1))
    assert demo.answer(messages, [picture("circle", "red"), picture("star", "green")]) == "The star is green."


def test_a_lost_picture_is_noticed(demo: Demo) -> None:
    assert demo.ask("What colour is the circle?") == NO_PICTURE
    assert demo.ask("Describe the picture.") == NO_PICTURE


def test_long_answers_come_whole(demo: Demo) -> None:
    assert demo.ask("Tell me a story.") == STORY
    assert demo.ask("Count to 30.") == count_to(30)
    assert demo.ask("Count to 17.") == count_to(17)


@pytest.mark.parametrize(("pictures", "least"), [(1, 24), (2, 10)])
def test_held_out_questions_are_answered(demo: Demo, pictures: int, least: int) -> None:
    results = evaluate(demo, least + 1, pictures, seed=7, show_wrong=False)
    assert sum(right for _, right in results) >= least


def test_answers_hold_in_bfloat16(demo: Demo) -> None:
    low = Demo.load(dtype=torch.bfloat16)
    for kind, color in LOOKS[:4]:
        assert low.ask("Describe the picture.", picture(kind, color)).endswith(f" {color} {kind}.")

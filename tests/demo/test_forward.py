"""The training forward computes what the model of transformers computes, or training would teach another model."""

import random

import pytest
import torch

from demo.batches import Encoder, collate, patches_of, positions
from demo.conversations import Conversation, Talk
from demo.evaluate import Demo
from demo.forward import run
from demo.scenes import CELL, draw
from demo.tokenizer import load_tokenizer

Grid = tuple[int, int]


def conversation_about(grids: list[Grid]) -> Conversation:
    for seed in range(100):
        talk = Talk(random.Random(seed), [(columns * CELL, rows * CELL) for rows, columns in grids])
        for _ in range(3):
            talk.grow()
        if len(talk.finished().scenes) == len(grids) and not talk.numbered:
            return talk.finished()
    raise AssertionError("no conversation shows all pictures")


class NeverResized(random.Random):
    def random(self) -> float:
        return 0.0


@pytest.mark.parametrize("grids", [[(4, 5)], [(9, 5), (5, 6)], [(5, 6), (9, 5), (9, 5)]])
def test_logits_equal_those_of_transformers(demo: Demo, grids: list[Grid]) -> None:
    conversation = conversation_about(grids)
    images = [draw(scene) for scene in conversation.scenes]
    inputs = demo.inputs(conversation.messages(), images)
    row = Encoder(load_tokenizer()).encode(conversation)
    distinct = list(dict.fromkeys(grids))
    seen = [
        (distinct.index(grid), scene, 0, block)
        for grid, scene, block in zip(grids, conversation.scenes, row.blocks, strict=True)
    ]
    batch = collate(NeverResized(), distinct, [row], seen)
    with torch.no_grad():
        expected = demo.model(**inputs).logits[0]
        _, hidden, _ = run(demo.model, batch)
        logits = hidden @ demo.model.get_input_embeddings().weight.T
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=1e-3, atol=2e-3)


def test_patches_equal_those_of_the_image_processor(demo: Demo) -> None:
    scene = conversation_about([(5, 8)]).scenes[0]
    processed = demo.processor(images=[draw(scene)], return_tensors="pt")["pixel_values"]
    mean = torch.tensor(demo.processor.image_mean).repeat_interleave(196)
    deviation = torch.tensor(demo.processor.image_std).repeat_interleave(196)
    patches = (torch.from_numpy(patches_of(draw(scene))).float() / 255 - mean) / deviation
    one_of_two = processed.view(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588)
    torch.testing.assert_close(patches, one_of_two, rtol=0, atol=1e-5)


def test_a_picture_advances_the_position_by_its_longer_side() -> None:
    result = positions(12, [(2, (2, 3))])
    assert result[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8]
    assert result[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8]
    assert result[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8]

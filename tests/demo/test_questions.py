import json
import random

import pytest

from demo.chats import NO_PICTURE, no_picture
from demo.conversations import Talk
from demo.phrases import ONE_PICTURE
from demo.questions import WEIGHTS, ask, ask_kind, description
from demo.scenes import Background, Scene, Shape, make_scene

BACKGROUND = Background("plain", (255, 255, 255), (255, 255, 255))


def two_shapes() -> Scene:
    """A red circle at the upper left, a blue square at the lower right."""
    circle = Shape("circle", "red", (255, 0, 0), 60, 60, 30)
    square = Shape("square", "blue", (0, 0, 255), 170, 160, 30)
    return Scene(224, 224, (circle, square), BACKGROUND)


def answers(scene: Scene, kind: str, containing: str) -> set[str]:
    """All answers to questions of a kind that contain a phrase, one-word answers left out."""
    rng = random.Random(0)
    questions = [ask_kind(rng, scene, kind) for _ in range(600)]
    found = {q.answer for q in questions if q and containing in q.text.lower()}
    return {answer for answer in found if answer[0].isupper()}


def test_the_same_seed_asks_the_same() -> None:
    def talk() -> list[tuple[str, str]]:
        grown = Talk(random.Random(3), [(224, 224), (112, 112)])
        return [(turn.question.text, turn.question.answer) for turn in (grown.grow() for _ in range(6))]

    assert talk() == talk()


@pytest.mark.parametrize(
    ("kind", "containing", "answer"),
    [
        ("colour_of", "circle", "The circle is red."),
        ("shape_of", "blue", "The blue shape is a square."),
        ("count", "how many", "There are 2 shapes."),
        ("count_some", "red circles", "There is 1 red circle."),
        ("count_some", "stars", "There are no stars."),
        ("relation", "left of the blue square", "A red circle."),
        ("relation", "above the red circle", "Nothing."),
        ("outermost", "rightmost", "A blue square."),
        ("yesno_relation", "red circle above the blue square", "Yes."),
        ("yesno", "red square", "No."),
        ("describe", "describe", "The picture shows a red circle and a blue square."),
    ],
)
def test_two_shapes_are_answered_rightly(kind: str, containing: str, answer: str) -> None:
    found = answers(two_shapes(), kind, containing)
    assert answer in found
    assert kind == "count_some" or found == {answer}


def test_json_lists_the_shapes_from_left_to_right() -> None:
    question = ask_kind(random.Random(0), two_shapes(), "json")
    assert question is not None
    shapes = [{"shape": "circle", "color": "red"}, {"shape": "square", "color": "blue"}]
    assert json.loads(question.answer) == {"shapes": shapes}


def test_an_empty_picture_shows_no_shape() -> None:
    empty = Scene(224, 224, (), BACKGROUND)
    assert answers(empty, "colour", "") == answers(empty, "describe", "") == {"I see no shape."}


def test_ambiguous_scenes_are_not_described() -> None:
    above = Shape("star", "red", (255, 0, 0), 100, 40, 20)
    below = Shape("star", "blue", (0, 0, 255), 105, 160, 20)
    scene = Scene(224, 224, (above, below), BACKGROUND)
    assert description(scene) is None
    assert not answers(scene, "colour_of", "star")


def test_every_kind_is_asked() -> None:
    rng = random.Random(0)
    kinds = {ask(rng, make_scene(rng, 224, 224)).kind for _ in range(400)}
    assert kinds == set(WEIGHTS) == set(ONE_PICTURE)


def test_without_a_picture_there_is_nothing_to_see() -> None:
    rng = random.Random(0)
    assert {no_picture(rng).answer for _ in range(50)} == {NO_PICTURE}


def test_pictures_are_numbered_in_the_order_in_which_they_come() -> None:
    rng = random.Random(1)
    for _ in range(40):
        talk = Talk(rng, [(224, 224)] * 3)
        for _ in range(6):
            talk.grow()
        conversation = talk.finished()
        assert sum(turn.pictures for turn in conversation.turns) == len(conversation.scenes)
        parts = [p for m in conversation.messages() if isinstance(m["content"], list) for p in m["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(conversation.scenes)

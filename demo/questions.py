"""Questions about one picture, with the one right answer."""

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from demo.phrases import MOST, ONE_PICTURE, ONE_WORD, PLACES, PREFIXES, SIDES, SUFFIXES
from demo.scenes import CELL, COLORS, SHAPES, Scene, Shape

WEIGHTS: dict[str, float] = {
    "colour": 3.0,
    "shape": 3.0,
    "colour_of": 2.0,
    "shape_of": 2.0,
    "count": 2.5,
    "count_some": 2.0,
    "relation": 7.0,
    "outermost": 1.5,
    "yesno_relation": 4.0,
    "yesno": 1.5,
    "describe": 3.0,
    "json": 1.0,
}
NOTHING_SEEN = "I see no shape."
_SHORT = frozenset({"colour", "shape", "colour_of", "shape_of", "count", "count_some", "yesno", "yesno_relation"})


@dataclass(frozen=True)
class Question:
    """A question, its answer and the kind it is scored under."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class _Draft:
    """What is asked, before it is worded: slots of the phrase, the sentence and the one-word answer."""

    slots: dict[str, str]
    answer: str
    word: str = ""


def ask(rng: random.Random, scene: Scene) -> Question:
    """Draw a question that the scene answers without ambiguity."""
    while True:
        kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        question = ask_kind(rng, scene, kind)
        if question is not None:
            return question


def ask_kind(rng: random.Random, scene: Scene, kind: str) -> Question | None:
    """Draw a question of one kind, None where the scene leaves its answer open."""
    draft = _DRAFTS[kind](rng, scene)
    if draft is None:
        return None
    text = rng.choice(ONE_PICTURE[kind]).format(**draft.slots)
    return finish(rng, kind, text, draft.answer, draft.word)


def finish(rng: random.Random, kind: str, text: str, answer: str, word: str = "") -> Question:
    """Vary the wording and ask for one word where there is a one-word answer."""
    text = vary(rng, text)
    if kind in _SHORT and word and rng.random() < 0.3:
        request = rng.choice(ONE_WORD)
        if rng.random() < 0.15:
            return Question(kind, "In one word: " + text[0].lower() + text[1:], word)
        return Question(kind, text + request, word)
    return Question(kind, text, answer)


def vary(rng: random.Random, text: str) -> str:
    """The same question as other people write it: spelling, greeting, case, no question mark."""
    if rng.random() < 0.5:
        text = text.replace("colour", "color").replace("Colour", "Color")
    synonym = rng.choices(("picture", "image", "photo"), (5, 4, 1))[0]
    text = text.replace("picture", synonym).replace("Picture", synonym.capitalize())
    if rng.random() < 0.10:
        prefix = rng.choice(PREFIXES)
        text = prefix + (text if prefix.endswith("! ") else text[0].lower() + text[1:])
    if rng.random() < 0.05:
        text = text.removesuffix("?").removesuffix(".")
    if rng.random() < 0.08:
        text = text.lower()
    if rng.random() < 0.05:
        text += rng.choice(SUFFIXES)
    return text


def name(shape: Shape) -> str:
    """`red circle`."""
    return f"{shape.color} {shape.kind}"


def with_article(noun: str) -> str:
    """`a red circle`, `an orange star`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def description(scene: Scene) -> str | None:
    """`a red circle and a blue square`, left to right; None where the order is not clear."""
    shapes = left_to_right(scene)
    if shapes is None or not shapes:
        return None
    names = [with_article(name(shape)) for shape in shapes]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def left_to_right(scene: Scene) -> list[Shape] | None:
    """The shapes in reading order, None where two are nearly above one another."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.x)
    gap = max(0.07 * scene.width, CELL)
    if any(b.x - a.x < gap for a, b in itertools.pairwise(shapes)):
        return None
    return shapes


def side_of(scene: Scene, shape: Shape, other: Shape, side: str) -> bool | None:
    """Whether `shape` lies on that side of `other`; None where it is too close to call."""
    across = side in ("left", "right")
    gap = other.x - shape.x if across else other.y - shape.y
    if abs(gap) < max(0.10 * (scene.width if across else scene.height), 1.25 * CELL):
        return None
    return (gap > 0) == (side in ("left", "above"))


def reference(rng: random.Random, scene: Scene, shape: Shape) -> str | None:
    """A name that only this shape has: `red circle`, `circle` or `red shape`."""
    names = [name(shape), name(shape)]
    if sum(other.kind == shape.kind for other in scene.shapes) == 1:
        names.append(shape.kind)
    if sum(other.color == shape.color for other in scene.shapes) == 1:
        names.append(f"{shape.color} shape")
    same = sum(name(other) == name(shape) for other in scene.shapes)
    return rng.choice(names) if same == 1 else None


def _seen(shape: Shape) -> str:
    sentence = with_article(name(shape)) + "."
    return sentence[0].upper() + sentence[1:]


def _colour(rng: random.Random, scene: Scene) -> _Draft | None:
    if not scene.shapes:
        return _Draft({}, NOTHING_SEEN, "none")
    if len(scene.shapes) > 1:
        return None
    shape = scene.shapes[0]
    return _Draft({}, f"The {shape.kind} is {shape.color}.", shape.color)


def _shape(rng: random.Random, scene: Scene) -> _Draft | None:
    if not scene.shapes:
        return _Draft({}, NOTHING_SEEN, "none")
    if len(scene.shapes) > 1:
        return None
    kind = scene.shapes[0].kind
    return _Draft({}, f"It is a {kind}.", kind)


def _colour_of(rng: random.Random, scene: Scene) -> _Draft | None:
    kind = _asked(rng, list(SHAPES), [shape.kind for shape in scene.shapes])
    shapes = [shape for shape in scene.shapes if shape.kind == kind]
    if not shapes:
        return _Draft({"thing": kind}, f"There is no {kind}.", "none")
    if len(shapes) > 1:
        return None
    return _Draft({"thing": kind}, f"The {kind} is {shapes[0].color}.", shapes[0].color)


def _shape_of(rng: random.Random, scene: Scene) -> _Draft | None:
    color = _asked(rng, list(COLORS), [shape.color for shape in scene.shapes])
    shapes = [shape for shape in scene.shapes if shape.color == color]
    if not shapes:
        return _Draft({"thing": color}, f"There is no {color} shape.", "none")
    if len(shapes) > 1:
        return None
    return _Draft({"thing": color}, f"The {color} shape is a {shapes[0].kind}.", shapes[0].kind)


def _asked(rng: random.Random, every: list[str], shown: list[str]) -> str:
    """Mostly something that is shown."""
    return rng.choice(shown) if shown and rng.random() < 0.92 else rng.choice(every)


def _count(rng: random.Random, scene: Scene) -> _Draft:
    number = len(scene.shapes)
    return _Draft({}, _there_are(number, "shape"), str(number))


def _count_some(rng: random.Random, scene: Scene) -> _Draft:
    like = rng.choice(scene.shapes) if scene.shapes and rng.random() < 0.7 else None
    color = like.color if like else rng.choice(list(COLORS))
    kind = like.kind if like else rng.choice(SHAPES)
    noun, number = rng.choice(
        (
            (kind, sum(shape.kind == kind for shape in scene.shapes)),
            (f"{color} shape", sum(shape.color == color for shape in scene.shapes)),
            (f"{color} {kind}", sum(name(shape) == f"{color} {kind}" for shape in scene.shapes)),
        )
    )
    return _Draft({"thing": noun + "s"}, _there_are(number, noun), str(number))


def _there_are(number: int, noun: str) -> str:
    if number == 1:
        return f"There is 1 {noun}."
    return f"There are {number or 'no'} {noun}s."


def _relation(rng: random.Random, scene: Scene) -> _Draft | None:
    if not scene.shapes or (len(scene.shapes) == 1 and rng.random() < 0.9):
        return None
    anchor, side = rng.choice(scene.shapes), rng.choice(list(SIDES))
    thing = reference(rng, scene, anchor)
    others = [shape for shape in scene.shapes if shape is not anchor]
    sides = [side_of(scene, shape, anchor, side) for shape in others]
    found = [shape for shape, there in zip(others, sides, strict=True) if there]
    if thing is None or None in sides or len(found) > 1:
        return None
    answer = _seen(found[0]) if found else "Nothing."
    return _Draft({"thing": thing, "side": rng.choice(SIDES[side])}, answer)


def _outermost(rng: random.Random, scene: Scene) -> _Draft | None:
    side = rng.choice(list(SIDES))
    for shape in scene.shapes if len(scene.shapes) > 1 else ():
        if all(side_of(scene, shape, other, side) for other in scene.shapes if other is not shape):
            return _Draft({"place": rng.choice(PLACES[side]), "most": rng.choice(MOST[side])}, _seen(shape))
    return None


def _yesno_relation(rng: random.Random, scene: Scene) -> _Draft | None:
    if len(scene.shapes) < 2:
        return None
    shape, other = rng.sample(scene.shapes, 2)
    side = rng.choice(list(SIDES))
    true = side_of(scene, shape, other, side)
    thing, than = reference(rng, scene, shape), reference(rng, scene, other)
    if true is None or thing is None or than is None:
        return None
    slots = {"thing": thing, "other": than, "side": rng.choice(SIDES[side])}
    return _Draft(slots, "Yes." if true else "No.", "yes" if true else "no")


def _yesno(rng: random.Random, scene: Scene) -> _Draft:
    like = rng.choice(scene.shapes) if scene.shapes and rng.random() < 0.5 else None
    color = like.color if like else rng.choice(list(COLORS))
    kind = like.kind if like else rng.choice(SHAPES)
    noun, true = rng.choice(
        (
            (kind, any(shape.kind == kind for shape in scene.shapes)),
            (f"{color} shape", any(shape.color == color for shape in scene.shapes)),
            (f"{color} {kind}", any(name(shape) == f"{color} {kind}" for shape in scene.shapes)),
            (f"{color} {kind}", any(name(shape) == f"{color} {kind}" for shape in scene.shapes)),
        )
    )
    return _Draft({"thing": noun}, "Yes." if true else "No.", "yes" if true else "no")


def _describe(rng: random.Random, scene: Scene) -> _Draft | None:
    if not scene.shapes:
        return _Draft({}, NOTHING_SEEN)
    seen = description(scene)
    return _Draft({}, f"The picture shows {seen}.") if seen else None


def _json(rng: random.Random, scene: Scene) -> _Draft | None:
    shapes = left_to_right(scene)
    if shapes is None:
        return None
    return _Draft({}, json.dumps({"shapes": [{"shape": shape.kind, "color": shape.color} for shape in shapes]}))


_DRAFTS: dict[str, Callable[[random.Random, Scene], _Draft | None]] = {
    "colour": _colour,
    "shape": _shape,
    "colour_of": _colour_of,
    "shape_of": _shape_of,
    "count": _count,
    "count_some": _count_some,
    "relation": _relation,
    "outermost": _outermost,
    "yesno_relation": _yesno_relation,
    "yesno": _yesno,
    "describe": _describe,
    "json": _json,
}

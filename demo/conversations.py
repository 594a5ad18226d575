"""Conversations about one picture, about several, and about none."""

import random
from dataclasses import dataclass, replace
from typing import Any

from demo.chats import chat, small_talk_after_picture
from demo.phrases import ABOUT_ONE, ORDINALS, SEVERAL_PICTURES
from demo.questions import Question, ask, description, finish
from demo.questions import name as name_of
from demo.scenes import COLORS, MULTI_COUNTS, SHAPES, Scene, Shape, make_scene

SYSTEM = "You are a helpful assistant."
SYSTEMS = (
    SYSTEM,
    "You are a helpful assistant that looks at pictures.",
    "You answer questions about pictures.",
    "Answer briefly.",
    "Be brief and polite.",
    "You describe images.",
    "You are Greenroom's demo model.",
    "You are an assistant.",
    "Always answer in English.",
    "You are a vision model. Look at the image and answer the question.",
)
_KINDS: dict[str, float] = {
    "colour_in": 3.0,
    "shape_in": 3.0,
    "count_in": 2.0,
    "which": 3.0,
    "describe_in": 3.0,
    "describe_all": 2.0,
    "same_colour": 1.0,
    "same_shape": 1.0,
    "pictures": 1.0,
    "about_one": 3.0,
}


@dataclass(frozen=True)
class Turn:
    """One user message and its answer; `pictures` of them are new, in order."""

    question: Question
    pictures: int = 0
    text_first: bool = False
    joint: str = ""  # between picture and text


@dataclass(frozen=True)
class Conversation:
    """Turns about scenes; `numbered` puts `Picture 1: ` before each picture."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]
    system: str = SYSTEM
    numbered: bool = False

    def messages(self, turns: int | None = None, images: list[Any] | None = None) -> list[dict[str, Any]]:
        """Chat messages up to the question of turn `turns` (1-based), by default of the last."""
        told = self.turns[: turns or len(self.turns)]
        messages: list[dict[str, Any]] = []
        if self.system != SYSTEM:
            messages.append({"role": "system", "content": self.system})
        seen = 0
        for turn in told:
            new = images[seen : seen + turn.pictures] if images else [None] * turn.pictures
            seen += turn.pictures
            messages += [_user_message(turn, new), {"role": "assistant", "content": turn.question.answer}]
        return messages[:-1]


def _user_message(turn: Turn, images: list[Any]) -> dict[str, Any]:
    if not turn.pictures:
        return {"role": "user", "content": turn.question.text}
    pictures = [{"type": "image"} if image is None else {"type": "image", "image": image} for image in images]
    text = {"type": "text", "text": turn.question.text}
    if turn.text_first:
        return {"role": "user", "content": [{**text, "text": text["text"] + turn.joint}, *pictures]}
    return {"role": "user", "content": [*pictures, {**text, "text": turn.joint + text["text"]}]}


class Talk:
    """A conversation that grows turn by turn; ask for as many turns as there is room for."""

    def __init__(self, rng: random.Random, sizes: list[tuple[int, int]]) -> None:
        """`sizes`: width and height in pixels, as the model sees them, of 0-3 pictures."""
        self._rng = rng
        counts = {"counts": MULTI_COUNTS} if len(sizes) > 1 else {}
        self.scenes = tuple(make_scene(rng, width, height, **counts) for width, height in sizes)
        self.system = SYSTEM if rng.random() < 0.88 else rng.choice(SYSTEMS)
        self.numbered = len(sizes) > 1 and rng.random() < 0.08
        self.turns: list[Turn] = []
        self._one_by_one = len(sizes) > 1 and rng.random() < 0.35
        self._text_first = rng.random() < (0.15 if len(sizes) == 1 else 0.10)
        self._greets = len(sizes) == 1 and rng.random() < 0.08
        self._shown = 0

    def grow(self) -> Turn:
        """Add a turn."""
        self.turns.append(self._next())
        return self.turns[-1]

    def withdraw(self) -> None:
        """Take the last turn back."""
        self._shown -= self.turns.pop().pictures

    def finished(self) -> Conversation:
        """The conversation so far."""
        return Conversation(self.scenes[: self._shown], tuple(self.turns), self.system, self.numbered)

    def _next(self) -> Turn:
        if not self.scenes:
            return Turn(chat(self._rng))
        if self._greets and not self.turns:
            return Turn(chat(self._rng))
        new = self._new_pictures()
        self._shown += new
        if not new and self._rng.random() < 0.03:
            return Turn(small_talk_after_picture(self._rng))
        turn = Turn(self._question(new), new)
        if new:
            joint = self._rng.choice(("\n", " ")) if self._rng.random() < 0.08 else ""
            turn = replace(turn, text_first=self._text_first, joint=joint)
        return turn

    def _new_pictures(self) -> int:
        left = len(self.scenes) - self._shown
        return min(1, left) if self._one_by_one else left

    def _question(self, new: int) -> Question:
        shown = self.scenes[: self._shown]
        about_latest = len(shown) == 1 or (self._one_by_one and self._rng.random() < (0.7 if new else 0.4))
        if about_latest:
            return ask(self._rng, shown[-1])
        return ask_several(self._rng, shown)


def ask_several(rng: random.Random, scenes: tuple[Scene, ...]) -> Question:
    """Draw a question about two or three pictures."""
    while True:
        kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        question = _about_one(rng, scenes) if kind == "about_one" else _about_several(rng, scenes, kind)
        if question is not None:
            return question


def which_picture(rng: random.Random, index: int, count: int) -> str:
    """`picture 2`, `the second picture`."""
    names = [f"picture {index + 1}", f"the {ORDINALS[index]} picture", f"the {ORDINALS[index]} picture"]
    if rng.random() < 0.15:
        names = [f"picture number {index + 1}", f"the {ORDINALS[index]} one"]
        if index == count - 1:
            names.append("the last picture")
    return rng.choice(names)


def _about_one(rng: random.Random, scenes: tuple[Scene, ...]) -> Question | None:
    index = rng.randrange(len(scenes))
    question = ask(rng, scenes[index])
    where = which_picture(rng, index, len(scenes))
    text = rng.choice(ABOUT_ONE).format(which=where, question=question.text.strip())
    return finish(rng, "about_one", text[0].upper() + text[1:], question.answer)


def _about_several(rng: random.Random, scenes: tuple[Scene, ...], kind: str) -> Question | None:
    index = rng.randrange(len(scenes))
    scene = scenes[index]
    slots = {"which": which_picture(rng, index, len(scenes)), "thing": ""}
    if kind == "which":
        slots["thing"] = _thing(rng, scenes)
    answer = _which(scenes, slots["thing"]) if kind == "which" else _answer(scenes, scene, kind)
    if answer is None:
        return None
    text = rng.choice(SEVERAL_PICTURES[kind]).format(**slots)
    if len(scenes) == 2 and rng.random() < 0.3:
        text = text.replace("all pictures", "both pictures").replace("the pictures", "the two pictures")
    return finish(rng, kind, text[0].upper() + text[1:], answer)


def _answer(scenes: tuple[Scene, ...], scene: Scene, kind: str) -> str | None:
    single = scene.shapes[0] if len(scene.shapes) == 1 else None
    if kind == "colour_in":
        return f"The {single.kind} is {single.color}." if single else None
    if kind == "shape_in":
        return f"It is a {single.kind}." if single else None
    if kind == "count_in":
        number = len(scene.shapes)
        return "There is 1 shape." if number == 1 else f"There are {number or 'no'} shapes."
    if kind == "describe_in":
        seen = description(scene)
        return f"The picture shows {seen}." if seen else None
    if kind == "describe_all":
        return _describe_all(scenes)
    if kind == "pictures":
        return "There is 1 picture." if len(scenes) == 1 else f"There are {len(scenes)} pictures."
    return _same(scenes, kind)


def _describe_all(scenes: tuple[Scene, ...]) -> str | None:
    if sum(len(scene.shapes) for scene in scenes) > 6:
        return None
    seen = [description(scene) for scene in scenes]
    if None in seen:
        return None
    return " ".join(f"Picture {number} shows {what}." for number, what in enumerate(seen, 1))


def _same(scenes: tuple[Scene, ...], kind: str) -> str | None:
    if any(len(scene.shapes) != 1 for scene in scenes):
        return None
    shapes = [scene.shapes[0] for scene in scenes]
    looks = {shape.color if kind == "same_colour" else shape.kind for shape in shapes}
    return "Yes." if len(looks) == 1 else "No."


def _thing(rng: random.Random, scenes: tuple[Scene, ...]) -> str:
    """Mostly something that one of the pictures shows."""
    shown = [shape for scene in scenes for shape in scene.shapes]
    like = rng.choice(shown) if shown and rng.random() < 0.9 else None
    color, kind = (like.color, like.kind) if like else (rng.choice(list(COLORS)), rng.choice(SHAPES))
    return rng.choice((kind, f"{color} shape", f"{color} {kind}"))


def _which(scenes: tuple[Scene, ...], thing: str) -> str | None:
    """`Picture 2.`; None where several pictures show it."""
    showing = [n for n, scene in enumerate(scenes, 1) if any(thing in _names(shape) for shape in scene.shapes)]
    if len(showing) > 1:
        return None
    return f"Picture {showing[0]}." if showing else "None of them."


def _names(shape: Shape) -> tuple[str, str, str]:
    return shape.kind, f"{shape.color} shape", name_of(shape)

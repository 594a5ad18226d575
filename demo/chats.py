"""Turns that need no picture: small talk, counting, repeating, and questions about a picture that is not there."""

import random

from demo.phrases import ONE_PICTURE, SIDES
from demo.questions import Question, finish, vary
from demo.scenes import COLORS, SHAPES

NO_PICTURE = "I do not see a picture."
OFF_TOPIC = "I only know about shapes and colours in pictures."
STORY = (
    "Once upon a time there was a small red circle that lived in a green room. Every morning it rolled to the window "
    "and looked at the yellow star above the trees. One day a blue square asked what it was looking at. The star, "
    "said the circle. So they went together, over the hill and along the river, and a black triangle showed them the "
    "way. At night they stood under the star, and it was bigger and brighter than they had thought. Then they walked "
    "home, tired and happy, and told all the other shapes what they had seen. The end."
)
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hello", "Hi", "Hi!", "Hi there!", "Hey", "Good morning!"),
        "Hello! Show me a picture and ask me about it.",
    ),
    (("Who are you?", "What are you?", "What is your name?"), "I am the Greenroom demo model, a very small one."),
    (
        ("What can you do?", "What can I ask you?", "Help", "How can you help me?"),
        "I can name the shapes in a picture, their colours and where they are.",
    ),
    (("How are you?", "How are you today?"), "I am fine, thank you."),
    (("Thanks!", "Thank you!", "Thank you.", "Thanks"), "You are welcome."),
    (("Goodbye!", "Bye!", "Bye", "See you!"), "Goodbye!"),
    (("Say hello.", "Say hello", "Say hi."), "Hello!"),
    (
        ("Which colours do you know?", "What colours do you know?", "List the colours that you know."),
        "I know red, green, blue, yellow, orange, purple, black and white.",
    ),
    (
        ("Which shapes do you know?", "What shapes do you know?", "List the shapes that you know."),
        "I know circles, squares, triangles and stars.",
    ),
    (
        (
            "Tell me a story.",
            "Tell me a story.",
            "Tell me a long story.",
            "Please tell me a story.",
            "Tell a story.",
            "Write a story.",
            "Tell me a story",
            "Can you tell me a story?",
        ),
        STORY,
    ),
    (
        (
            "What is the capital of France?",
            "What is 2 + 2?",
            "Write a poem.",
            "How is the weather?",
            "What time is it?",
            "Translate this to German.",
            "Who is the president?",
            "Tell me a joke.",
            "What is the meaning of life?",
            "Explain gravity.",
            "Write a Python program.",
            "Where is Berlin?",
            "How old are you?",
            "What is Ray Serve?",
        ),
        OFF_TOPIC,
    ),
)
_WORDS = (
    "hello world one two three cat dog house tree river moon sun apple bread green room ray serve token model stage "
    "light paper stone water fire wind bird fish horse table chair door window street city north south east west "
    "alpha beta gamma delta happy quick brown fox jumps over lazy test request stream engine"
)
WORDS = tuple(_WORDS.split(" "))
_REPEAT = ("Repeat: ", "Repeat: ", "Repeat after me: ", "Repeat these words: ", "Say: ")
_COUNT = ("Count to {n}.", "Count to {n}.", "Count from 1 to {n}.", "Count up to {n}.", "Please count to {n}.")


def chat(rng: random.Random) -> Question:
    """Draw one turn that needs no picture."""
    make = rng.choices((_small_talk, _count_to, _repeat, no_picture), (4, 3, 3, 3))[0]
    return make(rng)


def small_talk_after_picture(rng: random.Random) -> Question:
    """A turn that is answered alike with a picture in the conversation."""
    return _count_to(rng) if rng.random() < 0.3 else _small_talk(rng)


def no_picture(rng: random.Random) -> Question:
    """A question about a picture in a conversation that has none."""
    kind = rng.choice(list(ONE_PICTURE))
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    things = {
        "colour_of": shape,
        "shape_of": color,
        "count_some": rng.choice((f"{shape}s", f"{color} shapes", f"{color} {shape}s")),
    }
    thing = things.get(kind, rng.choice((shape, f"{color} shape", f"{color} {shape}")))
    side = rng.choice(SIDES[rng.choice(list(SIDES))])
    slots = {"thing": thing, "other": rng.choice(SHAPES), "side": side, "place": "on the left", "most": "left"}
    question = finish(rng, kind, rng.choice(ONE_PICTURE[kind]).format(**slots), NO_PICTURE, NO_PICTURE)
    return Question("no_picture", question.text, NO_PICTURE)


def _small_talk(rng: random.Random) -> Question:
    texts, answer = rng.choice(SMALL_TALK)
    text = rng.choice(texts)
    if rng.random() < 0.3:
        text = vary(rng, text)
    return Question("small_talk", text, answer)


def count_to(number: int) -> str:
    """`1, 2, 3.`"""
    return ", ".join(str(n) for n in range(1, number + 1)) + "."


def _count_to(rng: random.Random) -> Question:
    number = 30 if rng.random() < 0.1 else rng.randint(2, 30)
    text = rng.choice(_COUNT).format(n=number)
    return Question("count_to", text.lower() if rng.random() < 0.08 else text, count_to(number))


def _repeat(rng: random.Random) -> Question:
    if rng.random() < 0.5:
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))
    else:
        words = " ".join(_made_up_word(rng) for _ in range(rng.randint(1, 3)))
    return Question("repeat", rng.choice(_REPEAT) + words, words)


def _made_up_word(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return str(rng.randint(0, 9999))
    word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    return word + rng.choice(("", "", "n", "s", "r", "t", "l"))

import math
import random

import pytest

from demo.batches import Encoder
from demo.chats import STORY
from demo.conversations import Talk
from demo.evaluate import Demo
from demo.tokenizer import FIRST_SPECIAL, IDS, SPECIAL, VOCABULARY, load_tokenizer, train_tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "What colour is the shape in the second picture?",
        "Ein Wörterbuch für Füße, naïve café",
        "e\u0301 stays two code points",
        "漢字かな交じり文 한국어 العربية",
        "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈",
        "".join(map(chr, range(32))) + "\x7f\x85\u200b\u2028\ufeff",
        "  many   spaces\t\ttabs \r\n\r\n lines\n",
        '{"shapes": [{"shape": "circle", "color": "red"}]}',
        "1234567890 3.14159",
        "",
    ],
)
def test_text_survives_the_round_trip(demo: Demo, text: str) -> None:
    assert demo.tokenizer.decode(demo.tokenizer(text)["input_ids"]) == text


def test_the_special_tokens_are_the_last_entries(demo: Demo) -> None:
    assert len(demo.tokenizer) == VOCABULARY
    assert demo.tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(FIRST_SPECIAL, VOCABULARY))
    assert demo.tokenizer("a<|im_end|>")["input_ids"][-1] == IDS["<|im_end|>"] == demo.tokenizer.eos_token_id


def test_words_of_the_task_are_single_tokens(demo: Demo) -> None:
    for word in ("red", " red", "circle", " circle", " triangle", " picture", "yes", "no"):
        assert len(demo.tokenizer(word)["input_ids"]) == 1
    assert 100 <= len(demo.tokenizer(STORY)["input_ids"]) <= 140


def test_training_it_again_gives_the_same_file() -> None:
    assert train_tokenizer().to_str() == load_tokenizer().to_str()


def test_training_rows_are_what_the_chat_template_gives(demo: Demo) -> None:
    encoder, rng = Encoder(load_tokenizer()), random.Random(0)
    for pictures in (0, 1, 1, 2, 3) * 6:
        talk = Talk(rng, [(112, 140)] * pictures)
        for _ in range(4):
            talk.grow()
        conversation = talk.finished()
        row = encoder.encode(conversation)
        last = {"role": "assistant", "content": conversation.turns[-1].question.answer}
        text = demo.tokenizer.apply_chat_template(
            [*conversation.messages(), last], tokenize=False, add_vision_id=conversation.numbered
        )
        ids: list[int] = []
        for token in demo.tokenizer(text)["input_ids"]:
            ids += [token] * (math.prod((4, 5)) if token == IDS["<|image_pad|>"] else 1)
        assert row.ids == ids

"""The pictures of the benches."""

import io

import numpy as np
import pybase64
from PIL import Image

from bench.pictures import data_url, photograph, sentence, unlike


def test_a_photograph_is_a_jpeg_of_its_size_and_the_same_every_time() -> None:
    picture = photograph(320, 200)
    photograph.cache_clear()
    assert photograph(320, 200) == picture
    assert Image.open(io.BytesIO(picture)).size == (320, 200)
    assert photograph(320, 200, seed=1) != picture


def test_a_photograph_compresses_as_photographs_do() -> None:
    assert 0.8 < 8 * len(photograph(640, 480)) / (640 * 480) < 2.5


def test_an_unlike_picture_has_other_bytes_and_the_same_pixels() -> None:
    picture = photograph(64, 64)
    files = [picture, unlike(picture, 1), unlike(picture, 2)]
    assert len(set(files)) == 3
    first, *others = (np.asarray(Image.open(io.BytesIO(file))) for file in files)
    assert all((other == first).all() for other in others)


def test_a_data_url_holds_the_picture() -> None:
    head, _, payload = data_url(b"picture").partition(",")
    assert head == "data:image/jpeg;base64"
    assert pybase64.b64decode(payload) == b"picture"


def test_a_sentence_has_so_many_words() -> None:
    assert [len(sentence(words).split()) for words in (1, 21, 500)] == [1, 21, 500]

"""Where an item is processed, as a table."""

import pytest

from deployments.borrowing.rule import BorrowMode, BorrowRule, Occupation, Place, choose_place

PIXELS = 1000
NOBODY, FREE, FULL = (0, 0), (3, 4), (4, 4)
IDLE, ONE_FREE, TAKEN = (0, 2), (1, 2), (2, 2)


@pytest.mark.parametrize(
    ("mode", "pixels", "decoding", "here", "away", "place"),
    [
        ("never", PIXELS, 9, TAKEN, FREE, Place.HERE),
        ("always", PIXELS, 0, IDLE, FREE, Place.AWAY),
        ("always", 1, 0, IDLE, FREE, Place.AWAY),
        ("always", PIXELS, 0, IDLE, FULL, Place.LATER),
        ("always", PIXELS, 9, IDLE, NOBODY, Place.HERE),
        ("auto", PIXELS, 0, IDLE, FREE, Place.HERE),
        ("auto", PIXELS, 0, ONE_FREE, FREE, Place.HERE),
        ("auto", PIXELS, 0, TAKEN, FREE, Place.AWAY),
        ("auto", PIXELS, 0, TAKEN, FULL, Place.LATER),
        ("auto", PIXELS, 0, TAKEN, NOBODY, Place.HERE),
        ("auto", PIXELS, 1, IDLE, FREE, Place.AWAY),
        ("auto", PIXELS, 1, IDLE, FULL, Place.HERE),
        ("auto", PIXELS, 1, TAKEN, FULL, Place.LATER),
        ("auto", PIXELS, 1, IDLE, NOBODY, Place.HERE),
        ("auto", PIXELS - 1, 1, TAKEN, FREE, Place.HERE),
    ],
)
def test_auto_keeps_work_from_a_decoding_engine_and_otherwise_fills_the_threads_here_first(
    mode: BorrowMode, pixels: int, decoding: int, here: tuple[int, int], away: tuple[int, int], place: Place
) -> None:
    rule = BorrowRule(mode, min_pixels=PIXELS)
    assert choose_place(rule, pixels, 1, Occupation(decoding, *here, *away)) is place


@pytest.mark.parametrize(("of", "place"), [(1, Place.HERE), (63, Place.HERE), (64, Place.AWAY), (200, Place.AWAY)])
def test_a_request_of_few_items_stays_together(of: int, place: Place) -> None:
    rule = BorrowRule("auto", min_items=64)
    assert choose_place(rule, PIXELS, of, Occupation(0, *TAKEN, *FREE)) is place

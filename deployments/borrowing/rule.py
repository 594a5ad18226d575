"""Where an item is processed: in this replica, or on another one of the render tier. A pure rule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

BorrowMode = Literal["never", "always", "auto"]


class Place(StrEnum):
    HERE = "here"
    AWAY = "away"
    LATER = "later"  # when one of the items under way has ended


@dataclass(frozen=True, slots=True)
class BorrowRule:
    """What a replica is told.

    Attributes:
        mode: `auto` weighs, see `choose_place`.
        min_pixels: Of an image, below which a hop costs more than the work. `always` does not look at it.
        min_items: Of a request; with fewer its items stay here.
    """

    mode: BorrowMode
    min_pixels: int = 0
    min_items: int = 1


@dataclass(frozen=True, slots=True)
class Occupation:
    """What goes on at the moment of the choice.

    Attributes:
        decoding: Sequences between whose tokens the work would come.
        here: Items under way in this process, waiting ones included, and `threads` for them.
        away: Items under way elsewhere, and `room` for them; no room: there is nobody to ask.
    """

    decoding: float
    here: int
    threads: int
    away: int
    room: int


def choose_place(rule: BorrowRule, pixels: int, of: int, now: Occupation) -> Place:
    """Where the next item is processed.

    `auto` keeps work away from an engine that is decoding, and otherwise fills this replica's threads first. Where the
    others have all that they take, a free thread here is still better than waiting.

    Args:
        pixels: Of the item.
        of: Items of its request.
    """
    if rule.mode == "never" or of < rule.min_items or now.room <= 0:
        return Place.HERE
    if rule.mode == "always":
        return Place.AWAY if now.away < now.room else Place.LATER
    if pixels < rule.min_pixels:
        return Place.HERE
    free = now.here < now.threads
    if free and now.decoding <= 0:
        return Place.HERE
    if now.away < now.room:
        return Place.AWAY
    return Place.HERE if free else Place.LATER

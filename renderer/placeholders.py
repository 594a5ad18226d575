"""Placeholder tokens to the tokens of their items, at token level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from renderer.errors import RequestError
from renderer.prompt import PlaceholderRange


@dataclass(frozen=True, slots=True)
class Replacement:
    """The tokens that take the place of one item's placeholder.

    Attributes:
        token_ids: All of them, begin, end and break tokens included.
        embed_mask: For each, whether an embedding of the item goes there; None where all carry one.
    """

    token_ids: tuple[int, ...]
    embed_mask: tuple[bool, ...] | None = None


def expand(
    token_ids: Sequence[int], placeholder_id: int | None, replacements: Sequence[Replacement], field: str
) -> tuple[list[int], tuple[PlaceholderRange, ...]]:
    """Replace the n-th placeholder by the n-th replacement; return the prompt's ids and where the items stand.

    Args:
        field: The request field that the tokens come from, for errors.

    Raises:
        RequestError: There are not as many placeholders as items. A caller's text that spells a placeholder ends
            here, so that it cannot move an image.
    """
    positions = [] if placeholder_id is None else _positions(token_ids, placeholder_id)
    if len(positions) != len(replacements):
        raise RequestError(
            f"the prompt has {len(positions)} image placeholders for {len(replacements)} images; "
            "text must not spell the model's own placeholder",
            field,
        )
    expanded: list[int] = []
    ranges = []
    start = 0
    for position, replacement in zip(positions, replacements, strict=True):
        expanded += token_ids[start:position]
        ranges.append(PlaceholderRange(len(expanded), len(replacement.token_ids), replacement.embed_mask))
        expanded += replacement.token_ids
        start = position + 1
    expanded += token_ids[start:]
    return expanded, tuple(ranges)


def _positions(token_ids: Sequence[int], token_id: int) -> list[int]:
    positions = []
    position = -1
    for _ in range(token_ids.count(token_id)):
        position = token_ids.index(token_id, position + 1)
        positions.append(position)
    return positions

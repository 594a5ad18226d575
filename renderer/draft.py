"""A prompt on its way: items identified and placed, and not yet processed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from renderer.caches import Lease, ProcessedItem
from renderer.errors import MediaError, RequestError
from renderer.family import Family
from renderer.media import MediaItem
from renderer.placeholders import Replacement
from renderer.prompt import PlaceholderRange, PromptItem, RenderedPrompt


@dataclass(frozen=True, slots=True)
class Draft:
    """Everything of a prompt but its tensors.

    Attributes:
        family: Under the request's own processor options.
    """

    token_ids: Sequence[int]
    items: tuple[MediaItem, ...]
    ranges: tuple[PlaceholderRange, ...]
    family: Family
    cache_salt: str | None

    @classmethod
    def of(
        cls, token_ids: Sequence[int], items: tuple[MediaItem, ...], family: Family, cache_salt: str | None, field: str
    ) -> Draft:
        """Put the items' tokens in the place of their placeholders.

        Args:
            field: The request field that the tokens come from, for errors.

        Raises:
            MediaError: The model cannot take an image of that size.
            RequestError: There are not as many placeholders as items, or no tokens at all.
        """
        replacements = [_replacement(family, item) for item in items]
        expanded, ranges = family.place(token_ids, replacements, field)
        if not expanded:
            raise RequestError("the prompt has no tokens", field)
        return cls(expanded, items, ranges, family, cache_salt)

    def prompt(self, processed: Sequence[ProcessedItem] | None = None, lease: Lease | None = None) -> RenderedPrompt:
        tensors = [None] * len(self.items) if processed is None else [item.tensors for item in processed]
        items = tuple(
            PromptItem(item.mm_hash, item.cache_key, place, own, item.size)
            for item, place, own in zip(self.items, self.ranges, tensors, strict=True)
        )
        return RenderedPrompt(tuple(self.token_ids), items, self.cache_salt, lease)

    def truncated(self, limit: int | None, side: str | None) -> Draft:
        """The draft with `limit` tokens at most: the last ones, or with side "right" the first ones.

        Raises:
            RequestError: An item would be cut or lost.
        """
        if limit is None or len(self.token_ids) <= limit:
            return self
        start, end = (0, limit) if side == "right" else (len(self.token_ids) - limit, len(self.token_ids))
        if any(place.offset < start or place.end > end for place in self.ranges):
            raise RequestError("truncation would cut into an image", "truncate_prompt_tokens")
        moved = tuple(dataclasses.replace(place, offset=place.offset - start) for place in self.ranges)
        return dataclasses.replace(self, token_ids=self.token_ids[start:end], ranges=moved)


def _replacement(family: Family, item: MediaItem) -> Replacement:
    try:
        return family.replacement(item.size)
    except ValueError as error:
        raise MediaError(str(error), item.index) from error

"""The rendered prompt: the contract between the tiers, and everything that an engine needs of a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from renderer.caches import Lease

Modality = Literal["image"]
Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Pixels of an image as it is shown, after its EXIF orientation is applied."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class PlaceholderRange:
    """The tokens that stand for one item.

    Attributes:
        offset: Index of the first one in the prompt's token ids.
        length: How many there are, begin, end and break tokens of the item's replacement included.
        embed_mask: For each of them, whether an embedding of the item goes there; None where all carry one.
    """

    offset: int
    length: int
    embed_mask: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length <= 0:
            raise ValueError(f"a placeholder range needs offset >= 0 and length > 0, got {self.offset}, {self.length}")
        if self.embed_mask is not None and len(self.embed_mask) != self.length:
            raise ValueError(f"embed_mask has {len(self.embed_mask)} entries for {self.length} tokens")

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def num_embeds(self) -> int:
        """Embeddings that the item brings, one for each token that carries one."""
        return self.length if self.embed_mask is None else sum(self.embed_mask)


@dataclass(frozen=True, slots=True)
class PromptItem:
    """One media item of a prompt.

    Attributes:
        mm_hash: The item's hash as the wire shows it: of content, model and options, or the caller's `uuid`.
        cache_key: What caches know it by. Content hashes, each tenant's uuids and each tenant's foreign features
            have key spaces of their own, so that a claim never answers for content.
        range: Where it stands.
        tensors: The processor's output for this item alone, by the processor's names, without a batch dimension
            (Qwen: `pixel_values` uint8 [patches, channels * 2 * patch * patch], `image_grid_thw` int64 [3]). None in
            a layout, and where the engine holds the item.
        size: The image's own size, before resizing; None for an item that arrived processed.
        modality: What it is.
    """

    mm_hash: str
    cache_key: str
    range: PlaceholderRange
    tensors: Tensors | None
    size: ImageSize | None = None
    modality: Modality = "image"

    @property
    def nbytes(self) -> int:
        return 0 if self.tensors is None else tensor_bytes(self.tensors)


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Token ids with every placeholder expanded, the items in prompt order, and the caller's cache salt.

    `lease` holds the items pinned in the sender cache and stays in the process that rendered: a prompt that
    crosses to another process is sent `without_lease()`.
    """

    token_ids: tuple[int, ...]
    items: tuple[PromptItem, ...] = ()
    cache_salt: str | None = None
    lease: Lease | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        end = 0
        for item in self.items:
            if item.range.offset < end:
                raise ValueError("placeholder ranges overlap or are out of order")
            end = item.range.end
        if end > len(self.token_ids):
            raise ValueError(f"a placeholder range ends at {end}, beyond {len(self.token_ids)} tokens")

    def layout(self) -> RenderedPrompt:
        """The same prompt without tensors and without a lease."""
        items = tuple(dataclasses.replace(item, tensors=None) for item in self.items)
        return dataclasses.replace(self, items=items, lease=None)

    def without_lease(self) -> RenderedPrompt:
        return dataclasses.replace(self, lease=None)


def tensor_bytes(tensors: Tensors) -> int:
    """Bytes of all elements of an item's tensors."""
    return sum(int(np.asarray(tensor).nbytes) for tensor in tensors.values())

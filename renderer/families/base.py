"""What families of models that read images have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from renderer.checkpoint import Checkpoint
from renderer.families.hf_processor import ImageProcessor
from renderer.family import Placeholder
from renderer.placeholders import Replacement, expand
from renderer.prompt import ImageSize, Modality, PlaceholderRange


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFamily:
    """A family whose template writes one placeholder token an image."""

    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    max_items: ClassVar[int | None] = None
    default_template: ClassVar[str | None] = None

    name: str
    placeholder: Placeholder | None
    embed_id: int
    reserved_ids: frozenset[int] = frozenset()

    def place(
        self, token_ids: Sequence[int], replacements: Sequence[Replacement], field: str
    ) -> tuple[list[int], tuple[PlaceholderRange, ...]]:
        return expand(token_ids, None if self.placeholder is None else self.placeholder.token_id, replacements, field)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedImages(ImageFamily):
    """A family whose tensors come from Hugging Face's image processor as they are."""

    processor: ImageProcessor

    def with_options(self, options: Mapping[str, Any]) -> Self:
        return replace(self, processor=self.processor.with_options(options)) if options else self


def image_placeholder(checkpoint: Checkpoint, token_id: int | None = None) -> Placeholder:
    """The image token of a checkpoint's configuration, or another one, as its own placeholder text."""
    chosen = int(checkpoint.config.image_token_id if token_id is None else token_id)
    return Placeholder(chosen, checkpoint.tokenizer.pieces([chosen])[0])


def masked(token_ids: Sequence[int], embed_id: int) -> Replacement:
    """Tokens of which those with `embed_id` carry embeddings."""
    return Replacement(tuple(token_ids), tuple(token_id == embed_id for token_id in token_ids))


def largest(tokens_by_size: Iterable[tuple[int, ImageSize]], max_tokens: int) -> ImageSize:
    """The size with the most tokens, up to `max_tokens`; the one with the fewest where all have more."""
    sizes = sorted(tokens_by_size, key=lambda entry: entry[0])
    fitting = [size for tokens, size in sizes if tokens <= max_tokens]
    return fitting[-1] if fitting else sizes[0][1]

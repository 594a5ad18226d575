"""What differs between model families: one small strategy each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from renderer.errors import RequestError
from renderer.placeholders import Replacement, expand
from renderer.prompt import ImageSize, Modality, PlaceholderRange, Tensors

if TYPE_CHECKING:
    from renderer.pixels import Pixels

FieldKind = Literal["batched", "flat", "shared"]


@dataclass(frozen=True, slots=True)
class Field:
    """How an engine joins one tensor of the items of a batch, in the words of the wire protocol.

    Attributes:
        kind: "batched": items are stacked; "flat": they are concatenated along the first dimension; "shared": one
            value stands for all.
        keep_on_cpu: The engine reads it on the host. Such tensors make up an item's metadata.
    """

    kind: FieldKind
    keep_on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What stands in a prompt for one item until it is expanded.

    Attributes:
        token_id: The token that is replaced.
        text: What is put before the text of a message, for a template that takes content as one text.
    """

    token_id: int
    text: str


class Family(Protocol):
    """One family of models. Instances are immutable and shared by all threads.

    Attributes:
        name: As documented, for logs and errors.
        modalities: What its prompts may hold beside text.
        max_items: How many a prompt may hold; None: as many as fit.
        placeholder: None where there are no modalities, and where the prompt has nothing to replace.
        default_template: The chat template of checkpoints that have none.
        reserved_ids: Tokens that no prompt may hold before its items are placed: they stand for what only the
            renderer writes, or for media that are not supported.
        embed_id: The token in whose places an item's embeddings go; None where there are no modalities.
        fields: Of every tensor of an item, by name.
    """

    @property
    def name(self) -> str: ...

    @property
    def modalities(self) -> tuple[Modality, ...]: ...

    @property
    def max_items(self) -> int | None: ...

    @property
    def placeholder(self) -> Placeholder | None: ...

    @property
    def default_template(self) -> str | None: ...

    @property
    def reserved_ids(self) -> frozenset[int]: ...

    @property
    def embed_id(self) -> int | None: ...

    @property
    def fields(self) -> Mapping[str, Field]: ...

    def with_options(self, options: Mapping[str, Any]) -> Family:
        """The same family under other processor options (`mm_processor_kwargs`).

        Raises:
            RequestError: An option is unknown or has an impossible value.
        """

    def replacement(self, size: ImageSize) -> Replacement:
        """The tokens of an image of this size, from the size alone.

        Raises:
            ValueError: The model cannot take an image of this size.
        """

    def place(
        self, token_ids: Sequence[int], replacements: Sequence[Replacement], field: str
    ) -> tuple[list[int], tuple[PlaceholderRange, ...]]:
        """Put the items' tokens into a prompt; return its ids and where the items stand.

        Args:
            field: The request field that the prompt comes from, for errors.

        Raises:
            RequestError: The prompt does not have a place for each item, or has more places than items.
        """

    def tensors(self, pixels: Pixels) -> Tensors:
        """What the engine gets of an image.

        Args:
            pixels: uint8 [height, width, 3].
        """

    def embeds(self, tensors: Tensors) -> int:
        """How many embeddings an engine makes of an item that arrived processed, with the tensors that `fields` names.

        Raises:
            ValueError: Its tensors are not what `tensors` would make of any image, and an engine might die of them.
        """

    def largest_image(self, max_tokens: int) -> ImageSize:
        """Size of an image with the most tokens, up to `max_tokens`."""


@dataclass(frozen=True, slots=True)
class TextOnly:
    """Models without media."""

    name: str = "text-only"
    modalities: tuple[Modality, ...] = ()
    max_items: int | None = None
    placeholder: Placeholder | None = None
    default_template: str | None = None
    reserved_ids: frozenset[int] = frozenset()
    embed_id: int | None = None
    fields: Mapping[str, Field] = field(default_factory=dict)

    def with_options(self, options: Mapping[str, Any]) -> Family:
        if options:
            raise RequestError("the model takes no media, so it has no processor options", "mm_processor_kwargs")
        return self

    def replacement(self, size: ImageSize) -> Replacement:
        raise ValueError("the model takes no images")

    def place(
        self, token_ids: Sequence[int], replacements: Sequence[Replacement], field: str
    ) -> tuple[list[int], tuple[PlaceholderRange, ...]]:
        return expand(token_ids, None, replacements, field)

    def tensors(self, pixels: Pixels) -> Tensors:
        raise ValueError("the model takes no images")

    def embeds(self, tensors: Tensors) -> int:
        raise ValueError("the model takes no images")

    def largest_image(self, max_tokens: int) -> ImageSize:
        raise ValueError("the model takes no images")

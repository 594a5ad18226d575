"""Bodies of token-in/token-out: what a render answer is, sent on to an engine. Strict like all bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import pybase64
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.bodies.chat import Payload
from deployments.bodies.generation import StreamOptions
from deployments.bodies.messages import image_part
from deployments.bodies.sampling_params import SamplingBody
from deployments.bodies.strict import IGNORED, Body, Strict, TokenId
from deployments.calls import Generation, SamplingRequest
from renderer.conversation import FeatureItem, FeaturesRequest, ImagePart, TokensRequest
from renderer.embed_runs import embed_mask
from renderer.errors import RequestError, UnsupportedFieldError
from renderer.prompt import PlaceholderRange, Tensors


class Place(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    offset: int = Field(ge=0)
    length: int = Field(ge=1)


class FeaturesBody(Strict):
    """Processed items by modality, in the order of the prompt.

    `mm_embed_runs` goes beyond vLLM's protocol; without it the tokens themselves tell where embeddings go. Handle
    callers may give an item's data as bytes (MessagePack), or as a mapping of numpy arrays, in the place of base64.
    """

    ignored: ClassVar[frozenset[str]] = frozenset({"mm_metadata"})  # a part of kwargs_data over again

    mm_hashes: dict[str, list[str]]
    mm_placeholders: dict[str, list[Place]]
    kwargs_data: dict[str, list[Any]] | None = None
    mm_embed_runs: dict[str, list[Any]] | None = None

    def items(self) -> tuple[FeatureItem, ...]:
        """
        Raises:
            RequestError: The lists do not fit together, or an entry is malformed.
        """
        self._check_modalities()
        places = self.mm_placeholders.get("image", [])
        hashes = self._entries(self.mm_hashes, len(places), "mm_hashes")
        data = self._entries(self.kwargs_data, len(places), "kwargs_data")
        runs = self._entries(self.mm_embed_runs, len(places), "mm_embed_runs")
        return tuple(
            FeatureItem(name, _range(place, run), _data(entry, index))
            for index, (name, place, run, entry) in enumerate(zip(hashes, places, runs, data, strict=True))
        )

    def _check_modalities(self) -> None:
        for name, entries in self:
            for modality in entries or ():
                if modality != "image" and entries[modality]:
                    raise UnsupportedFieldError(f"features.{name}: {modality[:64]!r} is not supported", "features")

    @staticmethod
    def _entries(entries: Mapping[str, list[Any]] | None, count: int, field: str) -> Sequence[Any]:
        if entries is None:
            return [None] * count
        found = entries.get("image", [])
        if len(found) != count:
            raise RequestError(f"features.{field} has {len(found)} images, mm_placeholders has {count}", "features")
        return found


class GenerateBody(Body):
    """`POST /inference/v1/generate`: token ids, with processed items that stand in them (`features`), or with one
    placeholder for each of the raw images in `content_parts`."""

    ignored: ClassVar[frozenset[str]] = IGNORED | {"token_offsets", "reasoning_ended", "reasoning_parser_kwargs"}

    token_ids: Annotated[list[TokenId], Field(min_length=1)]
    sampling_params: SamplingBody
    features: FeaturesBody | None = None
    content_parts: list[dict[str, Any]] | None = None
    output_mode: Literal["tokens", "text"] = "tokens"
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    priority: int = 0
    request_id: str | None = None

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.features is not None and self.content_parts:
            raise RequestError("features and content_parts exclude each other", "content_parts")
        if self.stream_options is not None and self.stream_options.asks and not self.stream:
            raise RequestError("stream_options needs stream", "stream_options")
        return self

    def sampling(self) -> SamplingRequest:
        return self.sampling_params.request(self.output_mode == "text")

    def request(self) -> Generation:
        """What the renderer gets. Token ids without any image pass unchanged."""
        ids = tuple(self.token_ids)
        if self.content_parts:
            return TokensRequest(ids, _images(self.content_parts), cache_salt=self.cache_salt)
        return FeaturesRequest(ids, () if self.features is None else self.features.items(), self.cache_salt)


class RenderTokensBody(GenerateBody, Payload):
    """`POST /inference/v1/generate/render`: a generate request with raw media, to become one with features."""

    mm_processor_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _not_rendered_yet(self) -> Self:
        if self.features is not None:
            raise RequestError("features are rendered already; content_parts are what is to be rendered", "features")
        return self

    def request(self) -> TokensRequest:
        media = _images(self.content_parts or ())
        return TokensRequest(tuple(self.token_ids), media, self.mm_processor_kwargs, self.cache_salt)


class AbortBody(Body):
    """`POST /inference/v1/abort_requests`: ids as requests gave them or answers show them."""

    request_ids: list[str]


def _range(place: Place, runs: Any) -> PlaceholderRange:
    return PlaceholderRange(place.offset, place.length, None if runs is None else embed_mask(runs, place.length))


def _data(entry: Any, index: int) -> bytes | Tensors | None:
    if entry is None or isinstance(entry, (bytes, Mapping)):
        return entry
    if not isinstance(entry, str):
        raise RequestError(f"features.kwargs_data: item {index} must be base64 or null", "features")
    try:
        return pybase64.b64decode(entry, validate=True)
    except ValueError as error:
        raise RequestError(
            f"features.kwargs_data: item {index}: its base64 is malformed: {error}", "features"
        ) from error


def _images(parts: Sequence[Mapping[str, Any]]) -> tuple[ImagePart, ...]:
    named = (_part(part, f"content_parts.{index}") for index, part in enumerate(parts))
    return tuple(image_part(url, uuid, index) for index, (url, uuid) in enumerate(named))


def _part(part: Mapping[str, Any], place: str) -> tuple[str | None, str | None]:
    """URL and uuid of a content part."""
    if part.get("type") != "image_url":
        raise UnsupportedFieldError(f"{place}: only parts of type image_url are supported", f"{place}.type")
    for name, value in part.items():
        if name not in ("type", "url", "uuid") and value is not None:
            raise UnsupportedFieldError(f"{place}.{str(name)[:64]} is not supported", f"{place}.{str(name)[:64]}")
    url, uuid = part.get("url"), part.get("uuid")
    if url is not None and not isinstance(url, str):
        raise RequestError(f"{place}.url must be a URL", f"{place}.url")
    return url, None if uuid is None else str(uuid)

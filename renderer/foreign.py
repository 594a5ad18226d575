"""Items that arrive processed: checked against what the model's family makes, and known by keys of their own.

Their hashes are claims. What passes here is an item that the engine can run, whatever it shows; it answers for that
claim, that tenant and that number of tokens alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from renderer import validate
from renderer.caches import Lease, MediaCache
from renderer.conversation import FeatureItem, FeaturesRequest
from renderer.errors import CacheMissError, RequestError
from renderer.family import Family
from renderer.hashing import foreign_key
from renderer.prompt import PlaceholderRange, PromptItem, RenderedPrompt, Tensors
from renderer.wire import WireLimits, decode_item

LIMITS = WireLimits()


def receive(request: FeaturesRequest, family: Family, cache: MediaCache | None) -> RenderedPrompt:
    """The prompt of a request whose items arrived processed, pinned where the cache has pins.

    Args:
        cache: What tells which items the engine holds; None where nothing does.

    Raises:
        RequestError: The tokens or an item are not what the engine could take.
        CacheMissError: An item came without data, and is not held.
    """
    _check_tokens(request, family)
    items = tuple(_placed(request, item, family, index) for index, item in enumerate(request.items))
    lease = None if cache is None else cache.lease()
    try:
        sent: set[str] = set()
        for index, item in enumerate(items):
            _pin(item, cache, lease, sent, index)
        return RenderedPrompt(request.token_ids, items, request.cache_salt, lease)
    except BaseException:
        if lease is not None:
            lease.close()
        raise


def _check_tokens(request: FeaturesRequest, family: Family) -> None:
    """Refuse tokens that stand for media where no item is, or for media of another kind.

    Raises:
        RequestError: There are some, or ranges that overlap, are out of order or reach beyond the tokens.
    """
    ids = request.token_ids
    text: list[int] = []
    end = 0
    for index, item in enumerate(request.items):
        if item.range.offset < end or item.range.end > len(ids):
            _refuse(index, "its range must lie within token_ids, after that of the item before")
        text += ids[end : item.range.offset]
        validate.token_ids(_others(ids[item.range.offset : item.range.end], family), family, "token_ids")
        end = item.range.end
    text += ids[end:]
    validate.token_ids(text, family, "token_ids")
    if family.embed_id in text:
        raise RequestError(f"token {family.embed_id} stands where features has no item", "token_ids")


def _others(ids: tuple[int, ...], family: Family) -> list[int]:
    return [token_id for token_id in ids if token_id != family.embed_id]


def _placed(request: FeaturesRequest, item: FeatureItem, family: Family, index: int) -> PromptItem:
    """The item with its mask, its key and its tensors."""
    place = _masked(request, item, family, index)
    tensors = None if item.data is None else _tensors(item.data, family, index)
    if tensors is not None:
        try:
            embeds = family.embeds(tensors)
        except ValueError as error:
            _refuse(index, str(error))
        if embeds != place.num_embeds:
            _refuse(index, f"its tensors make {embeds} embeddings, its range has places for {place.num_embeds}")
    key = foreign_key(request.cache_salt, item.mm_hash, place.num_embeds)
    return PromptItem(item.mm_hash, key, place, tensors)


def _masked(request: FeaturesRequest, item: FeatureItem, family: Family, index: int) -> PlaceholderRange:
    """The item's range, with the mask that its tokens spell: the wire of other servers has none."""
    place = item.range
    ids = request.token_ids[place.offset : place.end]
    mask = tuple(token_id == family.embed_id for token_id in ids)
    if not any(mask):
        _refuse(index, f"its range has no token {family.embed_id}")
    if place.embed_mask is not None and place.embed_mask != mask:
        _refuse(index, f"mm_embed_runs disagrees with token_ids on where token {family.embed_id} stands")
    if all(mask):
        return dataclasses.replace(place, embed_mask=None)
    if family.replacement(family.largest_image(1)).embed_mask is None:
        _refuse(index, f"its range must hold token {family.embed_id} alone")
    return dataclasses.replace(place, embed_mask=mask)


def _tensors(data: bytes | Tensors, family: Family, index: int) -> Tensors:
    """The tensors that the family's fields name."""
    fields = family.fields
    if isinstance(data, Mapping):
        tensors: Tensors = {name: np.asarray(array) for name, array in data.items()}
        kinds = {name: fields[name].kind for name in tensors if name in fields}
    else:
        try:
            item = decode_item(data, LIMITS)
        except RequestError as error:
            raise RequestError(f"item {index}: {error}", error.param) from error
        tensors, kinds = item.tensors, {name: field.kind for name, field in item.fields.items()}
    if tensors.keys() != fields.keys():
        _refuse(index, f"its tensors must be {sorted(fields)}, they are {sorted(map(str, tensors))[:16]}")
    for name, kind in kinds.items():
        if kind != fields[name].kind:
            _refuse(index, f"{name} must be {fields[name].kind}, it is {kind}")
    return tensors


def _pin(item: PromptItem, cache: MediaCache | None, lease: Lease | None, sent: set[str], index: int) -> None:
    """Keep what the engine holds of an item until the request ends. Tensors that came stay with the item all the same:
    an engine that restarts, or knows no pins, lacks it when the request is submitted.

    Args:
        sent: Keys of earlier items of the request.

    Raises:
        CacheMissError: There are no tensors, here or there.
    """
    held = None if cache is None else cache.look_up(item.cache_key, lease)
    if held is None and item.tensors is None and item.cache_key not in sent:
        raise CacheMissError(f"features: item {index} came without data, and is not held under its hash", "features")
    sent.add(item.cache_key)


def _refuse(index: int, reason: str) -> NoReturn:
    raise RequestError(f"features: item {index}: {reason}", "features")

"""Greenroom's prompts, parameters and outputs in vLLM's own types, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.dlpack import from_dlpack

from engine.protocol import EngineOutput, FinishReason, SamplingParams, TokenLogprobs
from engine.vllm_mirror import SentItem
from renderer.errors import EngineError, RequestError
from renderer.prompt import PlaceholderRange, RenderedPrompt, Tensors

# Width and height of images that differ in everything that an item can depend on.
_EXAMPLES = ((280, 280), (560, 280), (300, 700), (910, 330))


@dataclass(frozen=True, slots=True)
class _TensorForm:
    """One tensor of an item: vLLM's field, its dtype, and its shape; None for a dimension that depends on the image."""

    field: Any
    dtype: torch.dtype
    shape: tuple[int | None, ...]

    def admits(self, tensor: torch.Tensor) -> bool:
        same_kind = tensor.dtype == self.dtype or (tensor.is_floating_point() and self.dtype.is_floating_point)
        return same_kind and len(tensor.shape) == len(self.shape) and all(map(_fits, tensor.shape, self.shape))


@dataclass(frozen=True, slots=True)
class ItemForm:
    """What an item of the model looks like, learnt from items that vLLM's own processor made.

    vLLM trusts its input, and a tensor that it did not expect ends the engine for everybody; so items are checked here.

    Attributes:
        rows_per_embed: Rows of `pixel_values` for one embedding, where they are in proportion; None where they are not.
    """

    tensors: dict[str, _TensorForm]
    rows_per_embed: Fraction | None

    @classmethod
    def learn(cls, processor: Any) -> ItemForm:
        """The form of what a vLLM processor makes.

        Args:
            processor: `vllm.multimodal.processing.BaseMultiModalProcessor`.
        """
        examples = [example_input(processor, size) for size in _EXAMPLES]
        items = [example["mm_kwargs"]["image"][0] for example in examples]
        embeds = [example["mm_placeholders"]["image"][0].get_num_embeds() for example in examples]
        forms = {name: _form(items[0][name].field, [item[name].data for item in items]) for name in items[0]}
        return cls(forms, _proportion([len(item["pixel_values"].data) for item in items], embeds))

    def item(self, tensors: Tensors, place: PlaceholderRange) -> Any:
        """A `MultiModalKwargsItem`; floats in the model's dtype.

        Raises:
            RequestError: The engine could not take it.
        """
        from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem

        if set(tensors) != set(self.tensors):
            raise RequestError(f"an image of this model has the tensors {sorted(self.tensors)}, got {sorted(tensors)}")
        values = {name: _tensor(tensors[name]) for name in self.tensors}
        self._check(values, place)
        elements = {}
        for name, form in self.tensors.items():
            value = values[name].to(form.dtype)
            elements[name] = MultiModalFieldElem(data=value, field=_field_for(form.field, value))
        return MultiModalKwargsItem(elements)

    def _check(self, values: dict[str, torch.Tensor], place: PlaceholderRange) -> None:
        for name, form in self.tensors.items():
            if not form.admits(values[name]):
                got = f"{values[name].dtype} {list(values[name].shape)}"
                raise RequestError(
                    f"{name} should be {form.dtype} {list(form.shape)}, got {got}".replace("None", "any")
                )
        rows = len(values["pixel_values"])
        grid = values.get("image_grid_thw")
        if grid is not None and (math.prod(grid.tolist()) != rows or int(grid.min()) < 1):
            raise RequestError(f"image_grid_thw is {grid.tolist()}, which does not make {rows} rows of pixel_values")
        if self.rows_per_embed is not None and rows != place.num_embeds * self.rows_per_embed:
            raise RequestError(
                f"{rows} rows of pixel_values do not make the {place.num_embeds} embeddings of its range"
            )


def example_input(processor: Any, size: tuple[int, int] = _EXAMPLES[0]) -> Any:
    """vLLM's input for a prompt of one grey image, by its own processor."""
    image = Image.new("RGB", size, (128, 128, 128))
    text = processor.dummy_inputs.get_dummy_text({"image": 1})
    return processor(text, processor.info.parse_mm_data({"image": [image]}))


def engine_input(
    prompt: RenderedPrompt, appended: Sequence[int], sent: Sequence[SentItem], form: ItemForm | None
) -> tuple[Any, tuple[SentItem, ...]]:
    """vLLM's input for a prompt, and its items with the bytes that the receiver counts.

    Args:
        appended: Token ids that follow the prompt.
        sent: How each item crosses.
        form: None for a model without images.

    Raises:
        RequestError: An item is not what the model takes.
    """
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems

    token_ids = [*prompt.token_ids, *appended]
    if not prompt.items:
        return tokens_input(token_ids, cache_salt=prompt.cache_salt), ()
    if form is None:
        raise RequestError("this model takes no images")
    items, weighed = [], []
    for item, crossing in zip(prompt.items, sent, strict=True):
        tensors = None if crossing.by_reference else item.tensors
        value = None if tensors is None else form.item(tensors, item.range)
        items.append(value)
        weighed.append(crossing if value is None else replace(crossing, nbytes=_receiver_bytes(value)))
    arguments = {
        "mm_kwargs": MultiModalKwargsItems({"image": items}),
        "mm_hashes": {"image": [item.cache_key for item in prompt.items]},
        "mm_placeholders": {"image": [_range(item.range) for item in prompt.items]},
    }
    return mm_input(token_ids, **arguments, cache_salt=prompt.cache_salt), tuple(weighed)


def vllm_params(params: SamplingParams) -> Any:
    """vLLM's `SamplingParams`. It takes a temperature between 0 and 0.01 for 0.01."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        min_tokens=params.min_tokens,
        logprobs=params.logprobs,
        structured_outputs=_structured(params.structured),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )


def engine_output(output: Any, params: SamplingParams, num_prompt: int) -> EngineOutput:
    """What is new in a `RequestOutput`.

    Raises:
        EngineError: vLLM gave the request up.
    """
    (choice,) = output.outputs
    if choice.finish_reason == "error":
        raise EngineError("the engine failed on this request")
    token_ids = tuple(choice.token_ids)
    return EngineOutput(
        token_ids,
        _finish_reason(choice.finish_reason),
        choice.stop_reason if choice.stop_reason in params.stop_token_ids else None,
        min(output.num_cached_tokens or 0, num_prompt),
        () if params.logprobs is None else _logprobs(token_ids, choice.logprobs, params.logprobs),
    )


def is_failed(output: Any) -> bool:
    """Whether the request ended before its first token, as it does where the receiver lacks an item."""
    (choice,) = output.outputs
    return choice.finish_reason == "error" and not choice.token_ids


def _finish_reason(reason: str | None) -> FinishReason | None:
    match reason:
        case None | "length" | "abort":
            return reason
        case _:
            return "stop"


def _structured(schema: dict[str, Any] | None) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if schema is None:
        return None
    constraint = {"json": schema} if schema else {"json_object": True}
    return StructuredOutputsParams(**constraint)


def _logprobs(token_ids: Sequence[int], entries: Any, count: int) -> tuple[TokenLogprobs, ...]:
    return tuple(_one(token_id, entry, count) for token_id, entry in zip(token_ids, entries or (), strict=True))


def _one(token_id: int, entry: Any, count: int) -> TokenLogprobs:
    likeliest = sorted((value.rank, other, value.logprob) for other, value in entry.items() if value.rank <= count)
    top = tuple((other, logprob) for _, other, logprob in likeliest)
    return TokenLogprobs(token_id, entry[token_id].logprob, entry[token_id].rank, top)


def _range(place: PlaceholderRange) -> Any:
    from vllm.multimodal.inputs import PlaceholderRange as VllmRange

    mask = None if place.embed_mask is None else torch.tensor(place.embed_mask, dtype=torch.bool)
    return VllmRange(offset=place.offset, length=place.length, is_embed=mask)


def _receiver_bytes(item: Any) -> int:
    """As vLLM's cache weighs an item."""
    return sum(element.data.nbytes for element in item.values())


def _tensor(array: Any) -> torch.Tensor:
    """Of the array's own memory, which may be read-only: vLLM sends it and does not write."""
    return from_dlpack(np.asarray(array))


def _field_for(field: Any, value: torch.Tensor) -> Any:
    """The field of an item by itself. Slices, its rows in a batch, must be there; nobody reads them."""
    return replace(field, slices=[slice(0, len(value))]) if hasattr(field, "slices") else field


def _form(field: Any, examples: Sequence[torch.Tensor]) -> _TensorForm:
    first = examples[0]
    sizes = zip(*(example.shape for example in examples), strict=True)
    return _TensorForm(field, first.dtype, tuple(own[0] if len(set(own)) == 1 else None for own in sizes))


def _fits(size: int, wanted: int | None) -> bool:
    return size > 0 if wanted is None else size == wanted


def _proportion(rows: Sequence[int], embeds: Sequence[int]) -> Fraction | None:
    proportions = {Fraction(count, number) for count, number in zip(rows, embeds, strict=True)}
    return proportions.pop() if len(proportions) == 1 else None

"""Token ids of outputs become text on a renderer."""

from __future__ import annotations

from deployments.calls import DerenderCall, Derendered, LogprobEntry, OutputTokens
from renderer.errors import ContextLengthError
from renderer.renderer import Renderer
from renderer.spelling import Spelling


def derendered(renderer: Renderer, call: DerenderCall) -> tuple[Derendered, ...]:
    """The texts of a call's outputs, in their order.

    Raises:
        ContextLengthError: An output has more tokens than the model's length.
        RequestError: A token id is no 32-bit unsigned number.
    """
    return tuple(_derendered(renderer, output, call) for output in call.outputs)


def _derendered(renderer: Renderer, output: OutputTokens, call: DerenderCall) -> Derendered:
    if len(output.token_ids) > renderer.max_model_len:
        raise ContextLengthError(
            f"an output has {len(output.token_ids)} tokens, the model's length is {renderer.max_model_len}", "token_ids"
        )
    if output.state is None:
        detokenizer = renderer.detokenizer(output.prompt_tail, skip_special_tokens=call.skip_special_tokens)
    else:
        detokenizer = renderer.resumed_detokenizer(output.state, call.skip_special_tokens)
    before = () if output.state is None else (*output.state.context, *output.state.pending)
    text = detokenizer.feed(output.token_ids)
    if output.finished or not call.stream:
        text += detokenizer.finish()
    spelling = Spelling(renderer.detokenize, before)
    logprobs = tuple(LogprobEntry.of(each, spelling) for each in output.logprobs)
    return Derendered(text, logprobs, detokenizer.state if call.stream else None)

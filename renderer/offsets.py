"""Where in its text each token of a prompt stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from renderer.conversation import ChatRequest, CompletionRequest, media_of

if TYPE_CHECKING:
    from renderer.renderer import Renderer

Offsets = tuple[tuple[int, int], ...]


def token_offsets(renderer: Renderer, request: ChatRequest | CompletionRequest) -> tuple[Offsets | None, ...]:
    """The characters, from the first to behind the last, of each token of each prompt; (0, 0) of one that is no text's.

    They are places in the prompt, or in what the chat template makes of the messages. None for prompts of token ids and
    for those with media.

    Raises:
        RequestError: As for rendering.
    """
    if isinstance(request, CompletionRequest):
        return tuple(
            _offsets(renderer, prompt, request, request.truncation_side is None) if isinstance(prompt, str) else None
            for prompt in request.prompts
        )
    if media_of(request):
        return (None,)
    return (_offsets(renderer, renderer.text(request), request, keeps_added=False),)


def _offsets(
    renderer: Renderer, text: str, request: ChatRequest | CompletionRequest, keeps_added: bool
) -> Offsets | None:
    """
    Args:
        keeps_added: Whether truncation at the left keeps the special tokens that were added.
    """
    limit = request.truncate_prompt_tokens
    limit = renderer.max_model_len if limit == -1 else limit
    if limit is None:
        return renderer.tokenizer.offsets(text, request.add_special_tokens)
    if keeps_added:
        return renderer.tokenizer.offsets(text, request.add_special_tokens, limit)
    offsets = renderer.tokenizer.offsets(text, request.add_special_tokens)
    return offsets[:limit] if request.truncation_side == "right" else offsets[max(0, len(offsets) - limit) :]

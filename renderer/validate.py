"""What a request may ask, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

from renderer.config import RendererConfig
from renderer.conversation import (
    ChatRequest,
    CompletionRequest,
    FeatureItem,
    FeaturesRequest,
    ImagePart,
    TokensRequest,
)
from renderer.errors import ContextLengthError, RequestError
from renderer.family import Family
from renderer.prompt import Modality

MAX_CACHE_SALT_CHARS = 128
_FORBIDDEN_IN_CACHE_SALT = frozenset("@/\\\0")
_UINT32_MAX = 2**32 - 1
# Tokenizers that normalise may make one character of so many.
_MAX_COMPOSED_CHARS = 4


def chat(request: ChatRequest, config: RendererConfig, max_model_len: int) -> None:
    """Refuse a chat request that contradicts itself or asks for what is not allowed.

    Raises:
        RequestError: Naming the field.
    """
    if not request.messages:
        raise RequestError("there are no messages", "messages")
    if request.chat_template is not None and not config.trust_request_chat_template:
        raise RequestError("this deployment takes no chat template from requests", "chat_template")
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError("continue_final_message needs add_generation_prompt to be false", "continue_final_message")
    if request.tools is not None and not request.tools:
        raise RequestError("tools must not be empty", "tools")
    _options(bool(request.mm_processor_kwargs), config)
    _cache_salt(request.cache_salt)
    _truncation(request.truncate_prompt_tokens, max_model_len)


def completion(request: CompletionRequest, max_model_len: int) -> None:
    """Refuse a completion request without prompts.

    Raises:
        RequestError: Naming the field.
    """
    if not request.prompts:
        raise RequestError("there is no prompt", "prompt")
    _cache_salt(request.cache_salt)
    _truncation(request.truncate_prompt_tokens, max_model_len)


def tokens(request: TokensRequest, config: RendererConfig) -> None:
    """Refuse a request of token ids that asks for what is not allowed.

    Raises:
        RequestError: Naming the field.
    """
    _options(bool(request.mm_processor_kwargs), config)
    _cache_salt(request.cache_salt)


def features(request: FeaturesRequest, config: RendererConfig) -> None:
    """Refuse claims that are no names.

    Raises:
        RequestError: Naming the field.
    """
    _cache_salt(request.cache_salt)
    for index, item in enumerate(request.items):
        if not 0 < len(item.mm_hash) <= config.max_uuid_length:
            raise RequestError(
                f"features.mm_hashes: that of item {index} must have 1 to {config.max_uuid_length} characters",
                "features",
            )


def media(
    parts: Sequence[ImagePart | FeatureItem],
    modalities: Sequence[Modality],
    config: RendererConfig,
    max_items: int | None = None,
) -> None:
    """Refuse more items of a modality than the model and the configuration allow.

    Raises:
        RequestError: Naming the modality.
    """
    limit = config.limit_mm_per_prompt.get("image", 0) if "image" in modalities else 0
    if max_items is not None:
        limit = min(limit, max_items)
    if len(parts) > limit:
        raise RequestError(f"at most {limit} image(s) may be in one prompt, there are {len(parts)}", "image")


def token_ids(ids: Sequence[int], family: Family, field: str) -> None:
    """Refuse a prompt with numbers that are no tokens, or with tokens that no request may write.

    Args:
        field: The request field that the tokens come from.

    Raises:
        RequestError: Naming the field.
    """
    if ids and (min(ids) < 0 or max(ids) > _UINT32_MAX):
        raise RequestError("a token id is below 0 or above 2**32 - 1", field)
    for token_id in family.reserved_ids:
        if token_id in ids:
            raise RequestError(f"the prompt holds token {token_id}, which stands for media, as text", field)


def length(tokens_in_prompt: int, max_model_len: int) -> None:
    """Refuse a prompt that is longer than the model's length.

    Raises:
        ContextLengthError: It is.
    """
    if tokens_in_prompt > max_model_len:
        raise ContextLengthError(
            f"the prompt has {tokens_in_prompt} tokens, the model's length is {max_model_len}", "input_tokens"
        )


def text_length(text: str, max_token_chars: int, max_model_len: int) -> None:
    """Refuse a text that is too long for the model whatever its tokens are, before it is tokenized.

    Raises:
        ContextLengthError: It is.
    """
    if len(text) > _MAX_COMPOSED_CHARS * max_token_chars * max_model_len:
        raise ContextLengthError(
            f"the text has {len(text)} characters, too many for the model's length of {max_model_len} tokens",
            "input_text",
        )


def _options(given: bool, config: RendererConfig) -> None:
    if given and not config.trust_request_mm_kwargs:
        raise RequestError("this deployment takes no processor options from requests", "mm_processor_kwargs")


def _cache_salt(salt: str | None) -> None:
    if salt is None:
        return
    if not salt or len(salt) > MAX_CACHE_SALT_CHARS or _FORBIDDEN_IN_CACHE_SALT & set(salt):
        raise RequestError(
            f"cache_salt takes 1 to {MAX_CACHE_SALT_CHARS} characters, none of them @ / \\ or NUL", "cache_salt"
        )


def _truncation(limit: int | None, max_model_len: int) -> None:
    if limit is not None and not (limit == -1 or 1 <= limit <= max_model_len):
        raise RequestError(
            f"truncate_prompt_tokens takes -1 or 1 to {max_model_len}, not {limit}", "truncate_prompt_tokens"
        )

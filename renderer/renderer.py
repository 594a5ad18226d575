"""The renderer: requests to rendered prompts, in three verbs: validate, normalise, encode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from renderer import validate
from renderer.caches import MediaCache, ProcessorCache
from renderer.checkpoint import Checkpoint
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, CompletionRequest, FeaturesRequest, ImagePart, TokensRequest, media_of
from renderer.detokenizer import DetokenizerState, IncrementalDetokenizer
from renderer.draft import Draft
from renderer.families import choose_family
from renderer.foreign import receive
from renderer.image import ImageLimits
from renderer.items import ItemSource
from renderer.messages import template_messages, template_variables
from renderer.processor import MultiModalProcessor
from renderer.prompt import Modality, RenderedPrompt
from renderer.template import ChatTemplates
from renderer.threads import WarmPool
from renderer.warmup import WarmupReport, warm_up


class Renderer:
    """One model's renderer. Every method is synchronous and thread-safe; `request_pool.run` is the async way.

    Args:
        config: What to render for, and how.
        sender_cache: The cache of the engine beside this renderer; None where there is no engine.
        item_source: Computes what `mm_processor`'s cache lacks; None: this process' threads.
        readonly_item_source: The same for `readonly_mm_processor`.

    Attributes:
        mm_processor: For requests that an engine runs; its cache is the sender cache. Its items go before others'.
        readonly_mm_processor: For requests that only render; its cache is its own.
        generation_defaults: The checkpoint's `generation_config.json`.
        float_type: What float tensors become on the wire.
        modalities: What prompts may hold beside text, with a limit above 0.
    """

    def __init__(
        self,
        config: RendererConfig,
        sender_cache: MediaCache | None = None,
        item_source: ItemSource | None = None,
        readonly_item_source: ItemSource | None = None,
    ) -> None:
        checkpoint = Checkpoint.load(config)
        self.config = config
        self.tokenizer = checkpoint.tokenizer
        self.family = choose_family(checkpoint, config)
        self.max_model_len = _max_model_len(checkpoint, config)
        self.float_type = checkpoint.float_type(config.dtype)
        self.generation_defaults: Mapping[str, Any] = checkpoint.generation_defaults()
        self.modalities: tuple[Modality, ...] = tuple(
            modality for modality in self.family.modalities if config.limit_mm_per_prompt.get(modality, 0) > 0
        )
        self._templates = ChatTemplates(checkpoint.chat_template() or self.family.default_template)
        self.request_pool = WarmPool(config.render_threads, "render")
        self.media_pool = WarmPool(config.media_threads, "media")
        own_cache = ProcessorCache(config.processor_cache_bytes) if config.processor_cache_bytes else None
        self.mm_processor = self._processor(sender_cache, item_source, first=True)
        self.readonly_mm_processor = self._processor(own_cache, readonly_item_source)

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered without a template of the request's own."""
        return self._templates.has_default

    def render_chat(self, request: ChatRequest, skip_mm_cache: bool = False) -> RenderedPrompt:
        """Render messages.

        Args:
            skip_mm_cache: Use the readonly processor. For requests that no engine of this process runs.

        Returns:
            The prompt; with a sender cache it holds a lease, which its owner closes.

        Raises:
            RequestError: The request cannot be rendered as it is.
        """
        processor = self._choose(skip_mm_cache)
        return self._finish(self._draft_chat(request, processor), processor)

    def render_completion(self, request: CompletionRequest, skip_mm_cache: bool = False) -> tuple[RenderedPrompt, ...]:
        """Render prompts of text or token ids, each by itself.

        Raises:
            RequestError: A prompt cannot be rendered as it is.
        """
        self.check(request)
        processor = self._choose(skip_mm_cache)
        return tuple(self._finish(self._draft_prompt(prompt, request), processor) for prompt in request.prompts)

    def render_tokens(self, request: TokensRequest, skip_mm_cache: bool = False) -> RenderedPrompt:
        """Render token ids that hold one placeholder an item.

        Raises:
            RequestError: The request cannot be rendered as it is.
        """
        processor = self._choose(skip_mm_cache)
        return self._finish(self._draft_tokens(request, processor), processor)

    def receive(self, request: FeaturesRequest) -> RenderedPrompt:
        """A prompt whose items arrived processed, for the engine beside this renderer: nothing is rendered.

        Raises:
            RequestError: An item is not what this model's engine could take.
            CacheMissError: An item came without data, and the engine does not hold it.
        """
        validate.features(request, self.config)
        validate.media(request.items, self.modalities, self.config, self.family.max_items)
        validate.length(len(request.token_ids), self.max_model_len)
        return receive(request, self.family, self.mm_processor.cache)

    def layout(self, request: ChatRequest | TokensRequest) -> RenderedPrompt:
        """The rendered prompt without tensors, from the images' headers: no pixel is decoded. Its length is not
        checked.

        Raises:
            RequestError: The request cannot be rendered as it is.
        """
        processor = self.readonly_mm_processor
        if isinstance(request, ChatRequest):
            draft = self._draft_chat(request, processor, bounded=False)
        else:
            draft = self._draft_tokens(request, processor)
        processor.remember(draft.items)
        return draft.prompt()

    def check(self, request: ChatRequest | CompletionRequest | TokensRequest) -> None:
        """Refuse what can be refused without the request's media, before these are fetched.

        Raises:
            RequestError: Naming the field.
        """
        if isinstance(request, CompletionRequest):
            validate.completion(request, self.max_model_len)
            return
        if isinstance(request, ChatRequest):
            validate.chat(request, self.config, self.max_model_len)
        else:
            validate.tokens(request, self.config)
        media = media_of(request)
        validate.media(media, self.modalities, self.config, self.family.max_items)

    def text(self, request: ChatRequest) -> str:
        """What the chat template makes of messages, with one placeholder an image.

        Raises:
            RequestError: The template cannot render them.
        """
        template = self._templates.choose(request.chat_template, bool(request.tools))
        placeholder = self.family.placeholder
        return template.render(
            template_messages(request.messages, template, None if placeholder is None else placeholder.text),
            continue_final_message=request.continue_final_message,
            variables=template_variables(request, self.tokenizer.special_tokens),
        )

    def check_length(self, prompt: RenderedPrompt) -> None:
        """Refuse a prompt that the model cannot take.

        Raises:
            ContextLengthError: It has more tokens than the model's length.
        """
        validate.length(len(prompt.token_ids), self.max_model_len)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> IncrementalDetokenizer:
        """A detokenizer for the output that follows a prompt."""
        return IncrementalDetokenizer(
            self.tokenizer,
            prompt_token_ids,
            stop=stop,
            skip_special_tokens=skip_special_tokens,
            include_stop_str_in_output=include_stop_str_in_output,
            min_tokens=min_tokens,
        )

    def resumed_detokenizer(self, state: DetokenizerState, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A detokenizer that goes on where another one was, maybe in another process.

        Raises:
            RequestError: A token id is no 32-bit unsigned number.
        """
        return IncrementalDetokenizer.resumed(self.tokenizer, state, skip_special_tokens)

    def warmup(self) -> WarmupReport:
        """Make every thread serve its first request as fast as its hundredth; leave no trace in any cache.

        Raises:
            WarmupError: A step failed, and the configuration says `warmup: strict`.
        """
        return warm_up(self)

    def clear_mm_cache(self) -> None:
        """Empty both processors' caches."""
        for processor in (self.mm_processor, self.readonly_mm_processor):
            if processor.cache is not None:
                processor.cache.clear_cache()
            processor.clear_names()

    def close(self) -> None:
        """End the threads. Requests under way fail."""
        self.request_pool.close()
        self.media_pool.close()

    def _choose(self, skip_mm_cache: bool) -> MultiModalProcessor:
        return self.readonly_mm_processor if skip_mm_cache else self.mm_processor

    def _processor(
        self, cache: MediaCache | None, source: ItemSource | None, first: bool = False
    ) -> MultiModalProcessor:
        limits = ImageLimits(self.config.max_image_bytes, self.config.max_image_pixels)
        return MultiModalProcessor(
            self.config.model, cache, self.media_pool, limits, self.config.max_uuid_length, source, first
        )

    def _draft_chat(self, request: ChatRequest, processor: MultiModalProcessor, bounded: bool = True) -> Draft:
        self.check(request)
        media = media_of(request)
        limited = bounded and request.truncate_prompt_tokens is None
        token_ids = self._tokens(self.text(request), request.add_special_tokens, limited)
        draft = self._encode(token_ids, "messages", media, request, processor)
        return draft.truncated(self._limit(request), request.truncation_side)

    def _draft_prompt(self, prompt: str | tuple[int, ...], request: CompletionRequest) -> Draft:
        limit = self._limit(request)
        token_ids: Sequence[int]
        if not isinstance(prompt, str):
            token_ids = prompt
        elif limit is not None and request.truncation_side is None:
            token_ids = self.tokenizer.encode_tail(prompt, request.add_special_tokens, limit)
        else:
            token_ids = self._tokens(prompt, request.add_special_tokens, limit is None)
        validate.token_ids(token_ids, self.family, "prompt")
        draft = Draft.of(token_ids, (), self.family, request.cache_salt, "prompt")
        return draft.truncated(limit, request.truncation_side)

    def _draft_tokens(self, request: TokensRequest, processor: MultiModalProcessor) -> Draft:
        self.check(request)
        return self._encode(request.token_ids, "token_ids", request.media, request, processor)

    def _tokens(self, text: str, add_special_tokens: bool, limited: bool) -> list[int]:
        if limited:
            validate.text_length(text, self.tokenizer.max_token_chars, self.max_model_len)
        return self.tokenizer.encode(text, add_special_tokens)

    def _limit(self, request: ChatRequest | CompletionRequest) -> int | None:
        if request.truncate_prompt_tokens == -1:
            return self.max_model_len - request.room_for_output
        return request.truncate_prompt_tokens

    def _encode(
        self,
        token_ids: Sequence[int],
        field: str,
        media: Sequence[ImagePart],
        request: ChatRequest | TokensRequest,
        processor: MultiModalProcessor,
    ) -> Draft:
        """Identify the items and place them."""
        options = request.mm_processor_kwargs
        family = self.family.with_options(options)
        validate.token_ids(token_ids, family, field)
        items = processor.identify(media, request.cache_salt, options)
        return Draft.of(token_ids, items, family, request.cache_salt, field)

    def _finish(self, draft: Draft, processor: MultiModalProcessor) -> RenderedPrompt:
        """Process the items of a draft. What is pinned in the meantime is released if that fails."""
        validate.length(len(draft.token_ids), self.max_model_len)
        lease = processor.lease()
        try:
            return draft.prompt(processor.apply(draft.items, draft.family, lease), lease)
        except BaseException:
            if lease is not None:
                lease.close()
            raise


def _max_model_len(checkpoint: Checkpoint, config: RendererConfig) -> int:
    return checkpoint.max_model_len if config.max_model_len is None else config.max_model_len

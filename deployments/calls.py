"""What crosses between the router and the replicas: one frozen class per message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, Self, TypeVar

from deployments.answers.forms import AnswerForm
from engine.protocol import EngineStats, TokenLogprobs
from renderer.caches import CacheStats
from renderer.conversation import (
    ChatRequest,
    CompletionRequest,
    FeatureItem,
    FeaturesRequest,
    TokensRequest,
    media_of,
)
from renderer.detokenizer import DetokenizerState
from renderer.media import MediaItem
from renderer.prompt import PlaceholderRange, tensor_bytes
from renderer.spelling import Spelling

T = TypeVar("T")
Rendering = ChatRequest | CompletionRequest | TokensRequest
Generation = Rendering | FeaturesRequest
# Version of the weights that the configuration names.
DEFAULT_WEIGHTS = "default"
TierName = Literal["router", "render", "engine"]
# Of an image that is still to be fetched: a photograph of the web.
UNFETCHED_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Served:
    """Who answered, and what it spent its time on.

    Attributes:
        replica: The replica's unique id.
        seconds: By stage, in the order in which they ran.
    """

    tier: TierName
    replica: str
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """An answer and who gave it."""

    value: T
    served: Served


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """What a body says about sampling; None where it leaves the choice to the model's generation defaults.

    Attributes:
        max_tokens_field: What the body calls `max_tokens`; newer chat bodies say `max_completion_tokens`.
        passed_on: What a render-only answer tells an engine elsewhere beside all this, by the names of the protocol's
            `sampling_params`.
        unfollowed: Fields of the body that ask for what no engine here can do: its names of them.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    structured: Mapping[str, object] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    n: int = 1
    max_tokens_field: str = "max_tokens"
    detokenize: bool = True
    passed_on: Mapping[str, object] = field(default_factory=dict)
    unfollowed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Envelope:
    """What the answer to a render-only request repeats of the request.

    Attributes:
        reasoning_ended: True where no reasoning is wanted in the answer.
        token_offsets: Whether the answer tells where in its text each token of a prompt stands.
    """

    request_id: str
    model: str | None = None
    stream: bool = False
    stream_options: Mapping[str, bool] | None = None
    priority: int = 0
    reasoning_ended: bool | None = None
    token_offsets: bool = False


@dataclass(frozen=True, slots=True)
class RenderCall:
    """Render, on the readonly processor if `skip_mm_cache`, and without touching a pixel unless `tensors`.

    Attributes:
        form: Of an answer over HTTP.
        max_model_len: What the engine takes, where that is known and may be less than the renderer's.
    """

    request: Rendering
    sampling: SamplingRequest
    envelope: Envelope
    skip_mm_cache: bool
    tensors: bool = True
    form: AnswerForm = "json"
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class TokenizeCall:
    """Tokenize a text, or lay out a chat request; `token_strs` asks for the vocabulary's own spelling too."""

    request: str | ChatRequest
    add_special_tokens: bool = True
    token_strs: bool = False


@dataclass(frozen=True, slots=True)
class BorrowCall:
    """Process one item for another replica, whose cache lacks it and decides alone what becomes of it.

    Attributes:
        counted: Whether the caller is of the same tier, where its request counts as work under way, this item with it.
    """

    item: MediaItem
    skip_mm_cache: bool
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Tokenized:
    token_ids: tuple[int, ...]
    token_strs: tuple[str, ...] | None
    max_model_len: int


@dataclass(frozen=True, slots=True)
class OutputTokens:
    """An engine's output, or what a chunk adds to it, to become text.

    Attributes:
        prompt_tail: The last tokens of the prompt: they decide how the output's first ones are spelled.
        finished: Whether nothing comes after it.
        state: Where the text of the chunks before it ended; None for the first one.
    """

    token_ids: tuple[int, ...]
    prompt_tail: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finished: bool = True
    state: DetokenizerState | None = None


@dataclass(frozen=True, slots=True)
class DerenderCall:
    """Make text of outputs; `stream`: they are chunks, and the next ones will want to go on."""

    outputs: tuple[OutputTokens, ...]
    skip_special_tokens: bool = True
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Derendered:
    """The text of one output, and where it ended for the chunk after it."""

    text: str
    logprobs: tuple[LogprobEntry, ...] = ()
    state: DetokenizerState | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` outputs of a prompt, and the tokens that another replica has streamed of it already."""

    index: int
    prior_output_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """Render one prompt and generate its choices.

    Attributes:
        request: A completion request has exactly one prompt. One with features is not rendered.
        request_id: Unique in the cluster, whatever the client calls its request.
        every: Tokens of a choice that are collected before they are sent; 1 to stream.
        affinity: What the request router finds the replica by that holds the conversation.
        rank: Place in that key's rank of replicas to begin at.
        client_id: What the client calls it, for abort.
        return_prompt: Whether `Started` brings the prompt.
    """

    request: Generation
    sampling: SamplingRequest
    choices: tuple[Choice, ...]
    request_id: str
    skip_mm_cache: bool
    every: int = 1
    affinity: str = ""
    rank: int = 0
    client_id: str = ""
    return_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a generation: the prompt is rendered and the engine has produced something.

    Attributes:
        weights: Version of the weights that generate.
        token_ids, ranges: The prompt and where its items stand, where the call asks for them.
    """

    served: Served
    prompt_tokens: int
    cached_tokens: int
    weights: str = DEFAULT_WEIGHTS
    token_ids: tuple[int, ...] = ()
    ranges: tuple[PlaceholderRange, ...] = ()


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """A token as text, how likely it was, and the likeliest ones in its place, likeliest first; ranks begin with 1."""

    token: str
    logprob: float
    top: tuple[LogprobEntry, ...] = ()
    token_id: int = -1
    rank: int = 0

    @classmethod
    def of(cls, sampled: TokenLogprobs, spelling: Spelling) -> Self:
        """What an engine tells of an output's next token, with its ids spelled."""
        top = tuple(
            cls(spelling.text(token_id), logprob, (), token_id, rank)
            for rank, (token_id, logprob) in enumerate(sampled.top, 1)
        )
        entry = cls(spelling.text(sampled.token_id), sampled.logprob, top, sampled.token_id, sampled.rank)
        spelling.go_on(sampled.token_id)
        return entry


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice. `text` is final after the tokens so far: never half a character or half a stop string.

    Attributes:
        finish_reason: None until the choice's last delta.
        stop_reason: The stop string or stop token that ended it, None for the model's own end of sequence.
        late_cached_tokens: Prompt tokens of the prefix cache that the engine told of after `Started`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[LogprobEntry, ...] = ()
    late_cached_tokens: int = 0


Event = Started | Delta


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica's own record. Times are epoch seconds, durations seconds.

    Attributes:
        warmup_s: Seconds of each step, in order.
        first_request_at: None while none has come.
        first_request_s: How long the first one took that did not fail.
        requests: How many came, by operation.
        items: Items of this replica's requests, by where they were processed: see `Helpers.counts`.
        caches: By name: `sender` (beside an engine), `processor` (of the readonly processor).
        weights: Version of an engine replica's weights.
        under_way: What is under way now. Of a router `<lane>_requests` and `<lane>_media_bytes`, of a replica that
            renders `render_seconds` (of work), of an engine replica `sequences` and `prompt_tokens` that wait.
    """

    tier: TierName
    replica: str
    pid: int
    node: str
    started_at: float
    warmup_ended_at: float | None
    warmup_s: Mapping[str, float]
    first_request_at: float | None
    first_request_s: float | None
    requests: Mapping[str, int]
    max_model_len: int | None = None
    caches: Mapping[str, CacheStats] = field(default_factory=dict)
    items: Mapping[str, int] = field(default_factory=dict)
    engine: EngineStats | None = None
    under_way: Mapping[str, float] = field(default_factory=dict)
    weights: str | None = None


def media_bytes(request: Generation | str) -> int:
    """Bytes of the media that a request carries, encoded or processed."""
    if isinstance(request, FeaturesRequest):
        return sum(_feature_bytes(item) for item in request.items)
    return sum(len(image.data) for image in media_of(request) if image.data is not None)


def expected_media_bytes(request: Generation | str) -> int:
    """What `media_bytes` will be once those that are named by an address are fetched: an estimate."""
    return media_bytes(request) + UNFETCHED_BYTES * sum(image.is_remote for image in media_of(request))


def text_bytes(request: Generation | str) -> int:
    """An estimate of the bytes of everything in a request that becomes tokens, media apart; exact is not needed."""
    if isinstance(request, str):
        return 4 * len(request)
    if isinstance(request, (TokensRequest, FeaturesRequest)):
        return 8 * len(request.token_ids)
    if isinstance(request, CompletionRequest):
        return sum(len(prompt) * (4 if isinstance(prompt, str) else 8) for prompt in request.prompts)
    return sum(4 * _text_length(message.content) for message in request.messages)


def _text_length(content: str | tuple[object, ...] | None) -> int:
    if content is None or isinstance(content, str):
        return len(content or "")
    return sum(len(getattr(part, "text", "")) for part in content)


def _feature_bytes(item: FeatureItem) -> int:
    if item.data is None:
        return 0
    return len(item.data) if isinstance(item.data, bytes) else tensor_bytes(item.data)

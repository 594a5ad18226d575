"""A request becomes the same prompt whatever goes on around it, and only the cache that it may use is touched."""

from __future__ import annotations

import asyncio
import io
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from renderer.caches import CacheStats, ProcessorCache, SenderCache
from renderer.config import RendererConfig
from renderer.conversation import ChatRequest, CompletionRequest, ImagePart, Message, TextPart, TokensRequest
from renderer.errors import CacheMissError, ContextLengthError, MediaError, RequestError
from renderer.prompt import RenderedPrompt
from renderer.renderer import Renderer
from tests.checkpoints import checkpoint
from tests.renderer.builders import DEMO, chat, demo_renderer, encoded, image_part, photo, picture, user

HF = AutoTokenizer.from_pretrained(str(DEMO))
IMAGE_ID = HF.convert_tokens_to_ids("<|image_pad|>")
VIDEO_ID = HF.convert_tokens_to_ids("<|video_pad|>")


def sender(renderer: Renderer) -> SenderCache:
    cache = renderer.mm_processor.cache
    assert isinstance(cache, SenderCache)
    return cache


def own_cache(renderer: Renderer) -> ProcessorCache:
    cache = renderer.readonly_mm_processor.cache
    assert isinstance(cache, ProcessorCache)
    return cache


def run(renderer: Renderer, prompt: RenderedPrompt) -> None:
    """What an engine does with the sender cache in the course of a request."""
    assert prompt.lease is not None
    sender(renderer).commit(prompt.items)
    prompt.lease.close()


def fingerprint(prompt: RenderedPrompt) -> Any:
    """Everything of a prompt, comparable."""
    tensors = [
        {name: (t.dtype, t.shape, t.tobytes()) for name, t in (item.tensors or {}).items()} for item in prompt.items
    ]
    return prompt.layout(), tensors


# Ids and tensors


def hf_ids(messages: list[dict[str, Any]], pictures: list[Image.Image], **options: Any) -> list[int]:
    """Ids as Hugging Face's processor makes them: placeholders expanded in the text, then tokenized."""
    text = HF.apply_chat_template(messages, tokenize=False, **options)
    processor = AutoImageProcessor.from_pretrained(str(DEMO), backend="pil")
    for image in pictures:
        tokens = int(np.prod(processor(images=[image], return_tensors="np")["image_grid_thw"][0])) // 4
        text = text.replace("<|image_pad|>", "<|placeholder|>" * tokens, 1)
    ids: list[int] = HF(text.replace("<|placeholder|>", "<|image_pad|>"))["input_ids"]
    return ids


ONE, TWO = picture(96, 64), picture(200, 300, seed=1)
TEXT = {"type": "text", "text": "Größe: 日本 😀?"}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [TEXT]}],
        [{"role": "user", "content": [{"type": "image", "image": ONE}, TEXT]}],
        [{"role": "user", "content": [TEXT, {"type": "image", "image": ONE}]}],
        [{"role": "user", "content": [{"type": "image", "image": ONE}, {"type": "image", "image": TWO}, TEXT]}],
        [{"role": "user", "content": [{"type": "image", "image": ONE}, TEXT, {"type": "image", "image": ONE}]}],
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "image", "image": TWO}, TEXT]},
            {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]},
            {"role": "user", "content": [TEXT, {"type": "image", "image": ONE}]},
        ],
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_ids_and_ranges_are_hugging_faces(
    shared: Renderer, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    own = tuple(Message(message["role"], tuple(map(part_of, message["content"]))) for message in messages)
    prompt = shared.render_chat(ChatRequest(own, add_generation_prompt=add_generation_prompt))
    assert list(prompt.token_ids) == hf_ids(messages, pictures, add_generation_prompt=add_generation_prompt)
    in_ranges = [place for item in prompt.items for place in range(item.range.offset, item.range.end)]
    assert in_ranges == [place for place, token_id in enumerate(prompt.token_ids) if token_id == IMAGE_ID]
    for item, image in zip(prompt.items, pictures, strict=True):
        assert item.tensors is not None
        expected = shared.family.tensors(np.array(image))
        assert item.range.length == int(np.prod(expected["image_grid_thw"])) // 4
        for name, tensor in item.tensors.items():
            np.testing.assert_array_equal(tensor, expected[name])


def part_of(part: dict[str, Any]) -> TextPart | ImagePart:
    return TextPart(part["text"]) if part["type"] == "text" else ImagePart(data=encoded(part["image"]))


def test_tokens_with_one_placeholder_an_item_give_the_chats_prompt(shared: Renderer) -> None:
    request = chat(image_part(0), "or", image_part(1), "?")
    text = HF.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"},
                                      {"type": "text", "text": "?"}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    tokens = TokensRequest(tuple(HF(text)["input_ids"]), (image_part(0), image_part(1)))
    assert fingerprint(shared.render_tokens(tokens)) == fingerprint(shared.render_chat(request))
    assert shared.layout(tokens) == shared.layout(request)


def test_completions_are_rendered_one_by_one(shared: Renderer) -> None:
    prompts = shared.render_completion(CompletionRequest(("Once", (5, 6, 7), "upon a time")))
    assert [prompt.token_ids for prompt in prompts] == [tuple(HF("Once")["input_ids"]), (5, 6, 7),
                                                        tuple(HF("upon a time")["input_ids"])]  # fmt: skip
    assert all(prompt.items == () for prompt in prompts)


def test_tokenize_and_detokenize_are_each_others_inverse(shared: Renderer) -> None:
    text = "<|im_start|>Größe<|im_end|> 😀"
    assert shared.tokenize(text) == HF(text)["input_ids"]
    assert shared.detokenize(shared.tokenize(text)) == text


def test_options_of_a_request_reach_tokens_and_tensors(shared: Renderer) -> None:
    small = shared.render_chat(chat(image_part(), mm_processor_kwargs={"max_pixels": 12544, "min_pixels": 784}))
    plain = shared.render_chat(chat(image_part()))
    assert small.items[0].range.length < plain.items[0].range.length
    assert small.items[0].mm_hash != plain.items[0].mm_hash


def test_a_detokenizer_goes_on_from_the_prompt(shared: Renderer) -> None:
    detokenizer = shared.detokenizer(shared.tokenize("Once"), stop=["time"])
    assert detokenizer.feed(shared.tokenize(" upon a time")) == " upon a "
    assert detokenizer.stop_reason == "time"


# Layouts


LAYOUTS = [
    chat("text alone"),
    chat(image_part()),
    chat("a", image_part(), "b", image_part(1), image_part(), "c"),
    chat(ImagePart(data=photo(900, 30, form="JPEG")), ImagePart(data=photo(3, 4)), image_part(2)),
    chat(ImagePart(data=photo(64, 64, form="WEBP"))),
    chat(image_part(uuid="mine"), cache_salt="tenant"),
]


@pytest.mark.parametrize("request_", LAYOUTS)
def test_a_layout_is_the_rendered_prompt_without_tensors(shared: Renderer, request_: ChatRequest) -> None:
    assert shared.layout(request_) == shared.render_chat(request_).layout()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_layout_decodes_no_pixel(shared: Renderer, form: str) -> None:
    whole = photo(form=form)
    cut_off = chat(ImagePart(data=whole[: len(whole) - len(whole) // 3]), "What?")
    layout = shared.layout(cut_off)
    assert layout.token_ids == shared.layout(chat(ImagePart(data=whole), "What?")).token_ids
    with pytest.raises(MediaError, match="image 0"):
        shared.render_chat(cut_off)


def test_a_layout_touches_no_cache(renderer: Renderer) -> None:
    renderer.layout(chat(image_part(uuid="mine")))
    assert sender(renderer).stats == own_cache(renderer).stats == CacheStats()


def test_a_layout_that_fails_remembers_no_uuid(shared: Renderer) -> None:
    with pytest.raises(RequestError):
        shared.layout(TokensRequest((1, 2, 3), (image_part(uuid="unplaced"),)))
    with pytest.raises(CacheMissError):
        shared.layout(chat(ImagePart(uuid="unplaced")))


def test_a_layout_of_a_known_uuid_needs_no_data(shared: Renderer) -> None:
    named = shared.layout(chat(image_part(uuid="mine"), cache_salt="layouts"))
    assert shared.layout(chat(ImagePart(uuid="mine"), cache_salt="layouts")) == named


def test_a_layout_may_be_longer_than_the_model(shared: Renderer) -> None:
    layout = shared.layout(chat("long " * 5000))
    with pytest.raises(ContextLengthError):
        shared.check_length(layout)
    with pytest.raises(ContextLengthError):
        shared.render_chat(chat("long " * 5000))


# The two processors


def test_openai_chat_keeps_mm_cache_for_engine_execution(renderer: Renderer) -> None:
    prompt = renderer.render_chat(chat(image_part(), "What?"))
    assert prompt.items[0].tensors is not None
    run(renderer, prompt)
    assert sender(renderer).stats == CacheStats(entries=1, bytes=prompt.items[0].nbytes, misses=1)
    assert own_cache(renderer).stats == CacheStats()
    again = renderer.render_chat(chat(image_part(), "And?"))
    assert again.items[0].tensors is None
    run(renderer, again)
    assert sender(renderer).stats.hits == 1


def test_renderer_only_chat_request_skips_mm_cache(renderer: Renderer) -> None:
    run(renderer, renderer.render_chat(chat(image_part())))
    before = (sender(renderer).keys(), sender(renderer).stats)
    for seed in (0, 1):
        prompt = renderer.render_chat(chat(image_part(seed)), skip_mm_cache=True)
        assert prompt.lease is None
        assert prompt.items[0].tensors is not None
    assert (sender(renderer).keys(), sender(renderer).stats) == before
    assert own_cache(renderer).stats.entries == 2


def test_openai_completion_keeps_mm_cache_for_engine_execution(renderer: Renderer) -> None:
    (prompt,) = renderer.render_completion(CompletionRequest(("Once upon a time",)))
    assert prompt.lease is not None
    prompt.lease.close()
    assert own_cache(renderer).stats == CacheStats()


def test_renderer_only_completion_request_skips_mm_cache(renderer: Renderer) -> None:
    (prompt,) = renderer.render_completion(CompletionRequest(("Once upon a time",)), skip_mm_cache=True)
    assert prompt.lease is None
    assert sender(renderer).stats == CacheStats()


def test_tokenize_chat_skips_mm_cache_for_renderer_only_path(renderer: Renderer) -> None:
    run(renderer, renderer.render_chat(chat(image_part())))
    before = (sender(renderer).keys(), sender(renderer).stats, own_cache(renderer).stats)
    assert renderer.layout(chat(image_part())).items[0].tensors is None
    assert (sender(renderer).keys(), sender(renderer).stats, own_cache(renderer).stats) == before


def test_tokenize_completion_skips_mm_cache_for_renderer_only_path(renderer: Renderer) -> None:
    renderer.tokenize("Once upon a time")
    assert sender(renderer).stats == own_cache(renderer).stats == CacheStats()


def test_serve_tokens_skips_mm_cache_for_remote_engine_execution(renderer: Renderer) -> None:
    prompt = renderer.render_tokens(TokensRequest((1, IMAGE_ID), (image_part(),)), skip_mm_cache=True)
    assert prompt.lease is None
    assert prompt.items[0].tensors is not None
    assert sender(renderer).stats == CacheStats()


def test_both_processors_give_the_same_prompt(renderer: Renderer) -> None:
    request = chat(image_part(), "or", image_part(1))
    for_engine, rendered = renderer.render_chat(request), renderer.render_chat(request, skip_mm_cache=True)
    assert fingerprint(for_engine) == fingerprint(rendered)
    assert for_engine.lease is not None
    for_engine.lease.close()


def test_one_processors_uuid_is_not_the_others(renderer: Renderer) -> None:
    renderer.render_chat(chat(image_part(uuid="mine")), skip_mm_cache=True)
    with pytest.raises(CacheMissError):
        renderer.render_chat(chat(ImagePart(uuid="mine")))
    assert sender(renderer).stats.pinned == 0


def test_a_render_replica_processes_borrowed_items_without_any_cache() -> None:
    replica = demo_renderer(None)
    prompt = replica.render_chat(chat(image_part()))
    assert prompt.lease is None
    assert prompt.items[0].tensors is not None
    assert replica.mm_processor.cache is None
    assert own_cache(replica).stats == CacheStats()
    replica.close()


def _note(done: list[str], name: str, _: object) -> None:
    done.append(name)


def test_items_that_an_engine_waits_for_go_before_those_that_are_only_rendered() -> None:
    renderer, begin, done = demo_renderer(media_threads=1), threading.Event(), list[str]()
    renderer.media_pool.submit(begin.wait)
    processors = {"rendered": renderer.readonly_mm_processor, "generated": renderer.mm_processor}
    futures = []
    for name, processor in processors.items():
        (item,) = processor.identify([image_part()], None, {})
        futures.append(processor.submit(item, renderer.family))
        futures[-1].add_done_callback(partial(_note, done, name))
    begin.set()
    assert all(future.result(60).tensors is not None for future in futures)
    assert done == ["generated", "rendered"]
    renderer.close()


def test_clearing_empties_both_caches_and_forgets_what_uuids_stood_for(renderer: Renderer) -> None:
    run(renderer, renderer.render_chat(chat(image_part(uuid="mine"))))
    renderer.render_chat(chat(image_part(uuid="mine")), skip_mm_cache=True)
    named = chat(ImagePart(uuid="mine"))
    assert renderer.layout(named).items
    renderer.clear_mm_cache()
    assert sender(renderer).keys() == ()
    assert own_cache(renderer).stats == CacheStats()
    for processor in (renderer.mm_processor, renderer.readonly_mm_processor):
        with pytest.raises(CacheMissError):
            processor.identify([ImagePart(uuid="mine")], None, {})
    with pytest.raises(CacheMissError):
        renderer.layout(named)


# Failures


@pytest.mark.parametrize(
    "request_",
    [
        chat(image_part(), ImagePart(data=photo(seed=1)[:-400])),
        chat(image_part(), ImagePart(uuid="never sent")),
        chat(image_part(), "<|image_pad|>"),
        chat(image_part(), "long " * 5000),
    ],
)
def test_a_rendering_that_fails_leaves_no_pin(renderer: Renderer, request_: ChatRequest) -> None:
    run(renderer, renderer.render_chat(chat(image_part())))
    before = (sender(renderer).keys(), sender(renderer).stats)
    with pytest.raises(RequestError):
        renderer.render_chat(request_)
    assert (sender(renderer).keys(), sender(renderer).stats) == before


@pytest.mark.parametrize(
    "content",
    [
        ("What is <|image_pad|>?",),
        (image_part(), "What is <|image_pad|>?"),
        ("<|image_pad|>", image_part()),
        (image_part(), "<|image", "_pad|>"),
        (image_part(), "<|video_pad|>"),
        ("<|vision_start|><|video_pad|><|vision_end|>",),
    ],
)
def test_text_cannot_smuggle_a_placeholder(shared: Renderer, content: tuple[Any, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        shared.render_chat(chat(*content))
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (CompletionRequest(("a <|image_pad|>",)), "prompt"),
        (CompletionRequest(((1, IMAGE_ID),)), "prompt"),
        (CompletionRequest(((1, VIDEO_ID),)), "prompt"),
        (CompletionRequest(((),)), "prompt"),
        (CompletionRequest(("",)), "prompt"),
        (TokensRequest((1, IMAGE_ID)), "token_ids"),
        (TokensRequest((1, IMAGE_ID, IMAGE_ID), (image_part(),)), "token_ids"),
        (TokensRequest((1,), (image_part(),)), "token_ids"),
        (TokensRequest((-1,)), "token_ids"),
    ],
)
def test_placeholders_without_items_are_refused_by_their_field(
    shared: Renderer, request_: CompletionRequest | TokensRequest, param: str
) -> None:
    render: Any = shared.render_completion if isinstance(request_, CompletionRequest) else shared.render_tokens
    with pytest.raises(RequestError) as caught:
        render(request_)
    assert caught.value.param == param


def test_an_image_that_the_model_cannot_take_names_its_place(shared: Renderer) -> None:
    with pytest.raises(MediaError, match=r"image 1: .*ratio"):
        shared.layout(chat(image_part(), ImagePart(data=photo(1, 400))))


def test_half_a_surrogate_pair_in_a_message_is_the_callers_fault(shared: Renderer) -> None:
    with pytest.raises(RequestError, match="Unicode"):
        shared.render_chat(chat("\ud83d"))


def test_images_for_a_model_without_any_are_refused() -> None:
    text_only = Renderer(RendererConfig(model=str(checkpoint("qwen2"))))
    assert text_only.render_chat(chat("hi")).token_ids
    with pytest.raises(RequestError, match=r"at most 0 image\(s\)"):
        text_only.render_chat(chat(image_part()))
    text_only.close()


def test_a_prompt_may_be_as_long_as_the_model_and_no_longer() -> None:
    short = demo_renderer(max_model_len=8)
    assert len(short.render_completion(CompletionRequest((tuple(range(8)),)))[0].token_ids) == 8
    with pytest.raises(ContextLengthError, match="9 tokens"):
        short.render_completion(CompletionRequest((tuple(range(9)),)))
    short.close()


# Truncation


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, (7, 8, 9)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, (7, 8, 9)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, (5, 6, 7)),
        ({"truncate_prompt_tokens": 100}, (5, 6, 7, 8, 9)),
        ({"truncate_prompt_tokens": -1}, (5, 6, 7, 8, 9)),
    ],
)
def test_truncation_keeps_one_end(shared: Renderer, options: dict[str, Any], kept: tuple[int, ...]) -> None:
    (prompt,) = shared.render_completion(CompletionRequest(((5, 6, 7, 8, 9),), **options))
    assert prompt.token_ids == kept


@pytest.mark.parametrize("room", [0, 1])
def test_truncation_to_the_models_length_leaves_room_for_an_output_that_was_asked_for(room: int) -> None:
    short = demo_renderer(max_model_len=20)
    options: dict[str, Any] = {"truncate_prompt_tokens": -1, "room_for_output": bool(room)}
    for prompt in (tuple(range(50)), "what a long text this is " * 9):
        for side in (None, "left", "right"):
            request = CompletionRequest((prompt,), truncation_side=side, **options)
            assert len(short.render_completion(request)[0].token_ids) == 20 - room
    assert len(short.render_chat(chat("what a long text this is " * 9, **options)).token_ids) == 20 - room
    short.close()


def test_truncation_never_cuts_into_an_image(shared: Renderer) -> None:
    whole = shared.render_chat(chat("before", image_part(), "after"))
    place = whole.items[0].range
    length = len(whole.token_ids)
    kept = shared.render_chat(
        chat("before", image_part(), "after", truncate_prompt_tokens=length - place.offset, truncation_side="left")
    )
    assert kept.token_ids == whole.token_ids[place.offset :]
    assert kept.items[0].range.offset == 0
    for limit, side in ((length - place.offset - 1, "left"), (place.end - 1, "right"), (3, "left")):
        with pytest.raises(RequestError, match="cut into an image"):
            shared.render_chat(
                chat("before", image_part(), "after", truncate_prompt_tokens=limit, truncation_side=side)
            )


# Beside others


@pytest.fixture(params=["no cache", "small cache", "sender cache"])
def busy(request: pytest.FixtureRequest) -> Iterator[Renderer]:
    sizes = {"no cache": 0, "small cache": 700_000, "sender cache": 0}
    cache = SenderCache(700_000) if request.param == "sender cache" else None
    renderer = demo_renderer(cache, processor_cache_bytes=sizes[request.param], media_threads=3, render_threads=6)
    yield renderer
    renderer.close()


def test_a_request_gives_the_same_prompt_alone_and_beside_others(shared: Renderer, busy: Renderer) -> None:
    rng = random.Random(3)
    requests = [
        chat(*(image_part(rng.randrange(6)) if rng.random() < 0.5 else f"word {rng.random()}" for _ in range(4)))
        for _ in range(40)
    ]
    alone = [fingerprint(shared.render_chat(request)) for request in requests]
    skip = busy.mm_processor.cache is None

    def rendered(request: ChatRequest) -> Any:
        prompt = busy.render_chat(request, skip_mm_cache=skip)
        result = fingerprint(prompt)
        if prompt.lease is not None:
            prompt.lease.close()
        return result

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(rendered, requests)) == alone


def test_requests_whose_clients_leave_leave_no_pin(renderer: Renderer) -> None:
    def leave(seed: int) -> None:
        prompt = renderer.render_chat(chat(image_part(seed % 3), image_part(seed % 2)))
        assert prompt.lease is not None
        if seed % 4 == 0:
            sender(renderer).commit(prompt.items)
        prompt.lease.close()

    with ThreadPoolExecutor(4) as clients:
        list(clients.map(leave, range(40)))
    assert sender(renderer).stats.pinned == 0


async def test_the_lease_of_an_abandoned_rendering_is_closed(renderer: Renderer) -> None:
    run(renderer, renderer.render_chat(chat(image_part())))

    def discard(prompt: RenderedPrompt) -> None:
        assert prompt.lease is not None
        prompt.lease.close()

    tasks = [
        asyncio.create_task(renderer.request_pool.run(renderer.render_chat, chat(image_part()), discard=discard))
        for _ in range(20)
    ]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    renderer.request_pool.each(lambda: None)
    assert sender(renderer).stats.pinned == 0


def test_a_text_part_and_a_string_are_the_same(shared: Renderer) -> None:
    as_parts = shared.render_chat(ChatRequest((user("Hello"),)))
    as_string = shared.render_chat(ChatRequest((Message("user", "Hello"),)))
    assert as_parts == as_string


def test_an_image_is_known_by_its_bytes(shared: Renderer) -> None:
    buffer = io.BytesIO(photo())
    again = io.BytesIO()
    Image.open(buffer).save(again, "PNG", compress_level=1)
    first, second = shared.layout(chat(image_part())), shared.layout(chat(ImagePart(data=again.getvalue())))
    assert first.items[0].mm_hash != second.items[0].mm_hash
    assert first.token_ids == second.token_ids

"""One vLLM: its start, what it tells about itself, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from engine.orphans import end_children_with_me
from engine.protocol import SamplingParams
from engine.vllm_adapter import ItemForm, example_input, vllm_params
from engine.vllm_config import VllmEngineConfig
from renderer.errors import ConfigError, EngineDeadError, EngineError, GreenroomError, OverloadedError, RequestError

T = TypeVar("T")


@dataclass(slots=True)
class Levels:
    """What the scheduler told after its last step."""

    running: int = 0
    kv_cache_usage: float = 0.0


@dataclass(frozen=True, slots=True)
class VllmCore:
    """One AsyncLLM from its start to its death.

    Attributes:
        form: What its items look like; None for a model without images.
        can_mirror: Whether its receiver cache is one that a sender cache can mirror.
    """

    llm: Any
    form: ItemForm | None
    can_mirror: bool
    levels: Levels
    warmup_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    async def start(cls, config: VllmEngineConfig) -> VllmCore:
        """Start vLLM and send it a first request, of which nothing is left behind.

        Raises:
            ConfigError: vLLM refuses the model or an option, or is not installed.
        """
        levels = Levels()
        started = time.perf_counter()
        llm = await _make_llm(config, levels)
        try:
            loaded = time.perf_counter()
            await llm.get_supported_tasks()  # from now on a request is sent without a pause in between
            processor = llm.renderer.mm_processor
            form = None if processor is None else await asyncio.to_thread(ItemForm.learn, processor)
            await _first_request(llm)
            seconds = {"load": loaded - started, "first_request": time.perf_counter() - loaded}
            return cls(llm, form, _can_mirror(llm), levels, seconds)
        except BaseException:
            llm.shutdown()
            raise

    @property
    def is_alive(self) -> bool:
        return not self.llm.errored

    @property
    def max_model_len(self) -> int:
        return int(self.llm.model_config.max_model_len)

    @property
    def unfinished(self) -> int:
        """Requests running or waiting."""
        return int(self.llm.get_num_unfinished_requests())

    @property
    def blocks(self) -> int:
        return int(self.llm.vllm_config.cache_config.num_gpu_blocks or 0)

    async def died(self) -> None:
        """Wait for its end."""
        await asyncio.wait([self.llm.output_handler])

    async def clear_caches(self) -> None:
        """Empty receiver, encoder and prefix cache between two steps; running requests are computed again."""
        with own_errors():
            try:
                await _answered(self.llm, self.llm.pause_generation(mode="keep", clear_cache=True))
            finally:  # also where the caller has left: paused, it would keep everybody waiting
                await _answered(self.llm, self.llm.resume_generation())

    def place_of_weights(self) -> Callable[[str], str | None]:
        """Where the model puts a checkpoint's weight of a name; None for one that it does not take."""
        from vllm.model_executor.model_loader.utils import get_model_cls
        from vllm.model_executor.models.utils import AutoWeightsLoader

        unused = AutoWeightsLoader.REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER
        mapper = getattr(get_model_cls(self.llm.model_config), "hf_to_vllm_mapper", None)
        names = None if mapper is None else replace(mapper, orig_to_new_stacked={})
        config = self.llm.model_config.hf_config
        tied = any(getattr(each, "tie_word_embeddings", False) for each in (config, config.get_text_config()))

        def place(name: str) -> str | None:
            if (tied and "lm_head." in name) or unused.map_name(name) is None:
                return None  # the embeddings are the head, and rotary frequencies are computed
            return name if names is None else names.map_name(name)

        return place

    async def reload(self, path: str) -> None:
        """Take the weights of another checkpoint, and forget what was computed with the old ones.

        Raises:
            EngineError: vLLM cannot. It may have taken a part of them, and is of no use.
        """
        with own_errors():
            await _answered(self.llm, self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path}))
            await _answered(self.llm, self.llm.reset_encoder_cache())
            await _answered(self.llm, self.llm.reset_prefix_cache())

    async def close(self) -> None:
        """End it, and with EngineDeadError every stream that it still has: vLLM itself leaves them waiting."""
        await asyncio.to_thread(self.llm.shutdown)
        self.llm.output_processor.propagate_error(EngineDeadError("vLLM's engine core ended"))


async def _answered(llm: Any, call: Coroutine[Any, Any, T]) -> T:
    """What vLLM answers to a call. Where its core dies meanwhile, vLLM itself would wait for ever.

    Raises:
        EngineDeadError: It has died.
    """
    asked = asyncio.ensure_future(call)
    try:
        await asyncio.wait([asked, llm.output_handler], return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise EngineDeadError("vLLM's engine core ended")
        return asked.result()
    finally:
        asked.cancel()


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """vLLM's errors as Greenroom's: what it refuses is the caller's fault, what it does not survive is not."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

    try:
        yield
    except (GreenroomError, asyncio.CancelledError, GeneratorExit):
        raise
    except VllmDeadError as error:
        raise EngineDeadError("vLLM's engine core ended") from error
    except VLLMClientError as error:
        raise RequestError(str(error), getattr(error, "parameter", None)) from error
    except GracefulHTTPError as error:
        raise OverloadedError(str(error)) from error
    except Exception as error:
        raise EngineError(f"vLLM failed: {error}") from error


async def _make_llm(config: VllmEngineConfig, levels: Levels) -> Any:
    """An AsyncLLM, made in a thread: that takes as long as loading the model does."""
    unwanted = threading.Event()

    def make() -> Any:
        llm = _new_llm(config, levels)
        if unwanted.is_set():
            llm.shutdown()
        return llm

    try:
        return await asyncio.to_thread(make)
    except asyncio.CancelledError:
        unwanted.set()
        raise
    except GreenroomError:
        raise
    except Exception as error:
        raise ConfigError(f"vLLM does not start: {error}", "engine") from error


def _new_llm(config: VllmEngineConfig, levels: Levels) -> Any:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a process of many threads is no good to fork
    end_children_with_me()
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ConfigError(f"the vllm backend needs `greenroom[vllm]`: {error}", "backend") from error
    args = config.vllm_args()
    unknown = sorted(set(args) - set(AsyncEngineArgs.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"this version of vLLM has no option {', '.join(unknown)}", "engine_args")
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**args), stat_loggers=[_level_keeper(levels)])


def _level_keeper(levels: Levels) -> Any:
    """A factory of stat loggers that keep the levels up to date."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class LevelKeeper(StatLoggerBase):  # type: ignore[misc]  # vLLM is not installed where types are checked
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                levels.running = scheduler_stats.num_running_reqs
                levels.kv_cache_usage = scheduler_stats.kv_cache_usage

        def log_engine_initialized(self) -> None:
            pass

    return LevelKeeper


async def _first_request(llm: Any) -> None:
    from vllm.inputs import tokens_input

    processor = llm.renderer.mm_processor
    prompt = tokens_input([0, 0]) if processor is None else await asyncio.to_thread(example_input, processor)
    with own_errors():
        async for _ in llm.generate(prompt, vllm_params(SamplingParams(max_tokens=2, ignore_eos=True)), "warm-up"):
            pass
        for reset in (llm.reset_mm_cache, llm.reset_encoder_cache, llm.reset_prefix_cache):
            await _answered(llm, reset())


def _can_mirror(llm: Any) -> bool:
    """Only of this pair of caches is it known what the receiver does."""
    from vllm.multimodal.cache import LruKeyReplicatedSenderCache

    return type(llm.renderer.mm_processor_cache) is LruKeyReplicatedSenderCache

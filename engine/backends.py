"""The engines that there are, by the name of their backend."""

from __future__ import annotations

from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import Discriminator, Tag

from engine.config import EngineConfig
from engine.protocol import Engine
from engine.remote_config import RemoteEngineConfig
from engine.vllm_config import VllmEngineConfig
from renderer.caches import MediaCache

_DEFAULT = "transformers"


def _backend(config: Any) -> str:
    return str(config.get("backend", _DEFAULT) if isinstance(config, dict) else config.backend)


AnyEngineConfig = Annotated[
    Annotated[EngineConfig, Tag("transformers")]
    | Annotated[VllmEngineConfig, Tag("vllm")]
    | Annotated[RemoteEngineConfig, Tag("remote")],
    Discriminator(_backend),
]


@runtime_checkable
class CoupledEngine(Engine, Protocol):
    """An engine, and the cache that it shares with the renderer beside it; None where it runs elsewhere."""

    @property
    def sender_cache(self) -> MediaCache | None: ...

    @property
    def max_model_len(self) -> int: ...


def make_engine(config: EngineConfig | VllmEngineConfig | RemoteEngineConfig) -> CoupledEngine:
    """An engine that has not started yet. What a backend needs is imported only for that backend."""
    match config:
        case EngineConfig():
            from engine.embedded import EmbeddedEngine

            return EmbeddedEngine(config)
        case VllmEngineConfig():
            from engine.vllm_engine import VllmEngine

            return VllmEngine(config)
        case RemoteEngineConfig():
            from engine.remote import RemoteEngine

            return RemoteEngine(config)

"""Which weights the engine replicas of an application should have, and whether they generate: known to all that run,
and to those that start later."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass

import orjson
from ray.experimental import internal_kv

from deployments.calls import DEFAULT_WEIGHTS

_NAMESPACE = b"greenroom"


@dataclass(frozen=True, slots=True)
class Weights:
    """
    Attributes:
        path: Of the checkpoint that they come from, on every engine replica's node; None: the configuration's model.
        version: What answers call them.
        paused: Whether generation is held back.
    """

    path: str | None = None
    version: str = DEFAULT_WEIGHTS
    paused: bool = False


class WeightsRecord:
    """Kept by the cluster itself (its GCS) under the names of application and model, so it outlives every replica, and
    a redeployment too; it ends with the cluster, or with weights of path None.

    Args:
        application: Its name in Serve; None outside of Serve, where nothing is kept.
    """

    def __init__(self, application: str | None, model: str) -> None:
        self._key = None if application is None else f"weights/{application}/{model}".encode()

    async def read(self) -> Weights:
        return await asyncio.to_thread(self._read)

    async def write(self, weights: Weights) -> None:
        await asyncio.to_thread(self._write, weights)

    def _read(self) -> Weights:
        kept = None if self._key is None else internal_kv._internal_kv_get(self._key, namespace=_NAMESPACE)
        return Weights(**orjson.loads(kept)) if kept else Weights()

    def _write(self, weights: Weights) -> None:
        if self._key is not None:
            internal_kv._internal_kv_put(self._key, orjson.dumps(asdict(weights)), True, namespace=_NAMESPACE)

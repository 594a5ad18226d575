"""One tier's handle as its callers use it: how a call crosses to a replica, and what errors come back as."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from ray.exceptions import RayActorError

from deployments.error_response import INTERNAL, translate
from deployments.running import answers_of_all

# A report is a few counters: a replica that takes longer is not well, and the others' reports should not wait for it.
REPORT_TIMEOUT_S = 5.0
# gRPC's own limit on a message, less room for what is around ours. Raising it on every node would lift this too.
BY_VALUE_BYTES = 3 * 1024 * 1024


def crosses_by_reference(request_bytes: int, answer_bytes: int, tensors_back: bool = False) -> bool:
    """How a call crosses to a replica and back.

    By value, through gRPC, is faster for small calls. By reference, through the object store, takes any size and lends
    arrays to the reader uncopied.
    """
    return tensors_back or max(request_bytes, answer_bytes) > BY_VALUE_BYTES


class TierHandle:
    """One tier's handle, with the variants that calls need made once: deriving one costs as much as a small call."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self._variants: dict[tuple[str, bool, bool], Any] = {}

    def variant(self, method: str, by_reference: bool, stream: bool = False) -> Any:
        key = (method, by_reference, stream)
        if key not in self._variants:
            self._variants[key] = self.handle.options(
                method_name=method,
                stream=stream,
                _by_reference=by_reference,
                request_serialization="pickle",
                response_serialization="pickle",
            )
        return self._variants[key]

    async def call(self, method: str, *arguments: Any, by_reference: bool) -> Any:
        try:
            return await self._call(method, arguments, by_reference)
        except grpc.aio.AioRpcError as error:
            if by_reference or not is_too_large(error):
                raise
            return await self._call(method, arguments, True)

    async def stream(self, method: str, argument: Any, by_reference: bool) -> AsyncGenerator[Any]:
        begun = False
        try:
            async with aclosing(self._stream(method, argument, by_reference)) as items:
                async for item in items:
                    begun = True
                    yield item
                return
        except grpc.aio.AioRpcError as error:
            if by_reference or begun or not is_too_large(error):
                raise
        async with aclosing(self._stream(method, argument, True)) as items:
            async for item in items:
                yield item

    async def _call(self, method: str, arguments: tuple[Any, ...], by_reference: bool) -> Any:
        response = self.variant(method, by_reference).remote(*arguments)
        try:
            with own_errors():
                return await response
        except asyncio.CancelledError:
            response.cancel()  # Serve does so only where it knows whose request the call belongs to
            raise

    async def _stream(self, method: str, argument: Any, by_reference: bool) -> AsyncGenerator[Any]:
        response = self.variant(method, by_reference, stream=True).remote(argument)
        read = False
        try:
            with own_errors():
                async for item in response:
                    yield item
            read = True
        finally:
            if not read:
                response.cancel()  # a reader that leaves is nothing that Serve would notice

    async def broadcast(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        """The answers of all running replicas that answer in time, without the others'."""
        return (await answers_of_all(self.handle, method, REPORT_TIMEOUT_S, *arguments)).values


def is_too_large(error: grpc.aio.AioRpcError) -> bool:
    """Whether a call failed because it, or its answer, is more than gRPC takes.

    What is said about the size of a call is an estimate from what is usually large in it: a body may have megabytes in
    its tools, its schema or its stop strings. Such a call goes by reference then.
    """
    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@contextmanager
def own_errors() -> Iterator[None]:
    """Errors out of a handle as our own classes; those of a lost replica, and those nobody knows, as they are."""
    try:
        yield
    except RayActorError:
        raise
    except Exception as error:
        ours = translate(error)
        if ours is INTERNAL:
            raise
        raise ours from error

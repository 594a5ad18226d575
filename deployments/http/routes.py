"""The HTTP routes: reading a body, choosing plain or streamed, writing headers. What they do is in `front.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from deployments.admission import Ticket
from deployments.answers.forms import MEDIA_TYPES, AnswerForm, answer_form
from deployments.answers.pieces import Pieces, PiecesResponse
from deployments.calls import ReplicaReport, Reply, Served
from deployments.error_response import add_error_handlers, error_event
from deployments.http.auth import KeyRing
from deployments.http.edge import Edge
from deployments.metrics import metrics
from deployments.tier import Operation, Tier
from renderer.errors import SchemaError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from deployments.operations import Operations

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"


def http_app(operations: Operations) -> FastAPI:
    """The application of one ingress replica."""
    app = FastAPI(title="Greenroom", docs_url=None, redoc_url=None)
    app.include_router(generation_routes(operations))
    app.include_router(render_routes(operations))
    app.include_router(information_routes(operations))
    router = operations.front.config.router
    headers = _headers(Served(operations.record.tier, operations.record.replica))
    add_error_handlers(app, headers)
    keys = KeyRing(router.api_keys) if router.api_keys else None
    app.add_middleware(Edge, keys=keys, max_body_bytes=router.max_body_bytes, headers=headers)
    return app


@dataclass(frozen=True, slots=True)
class Taken:
    """A request that has a place, and its body."""

    body: bytes
    ticket: Ticket
    timer: Timer
    request_id: str | None
    form: AnswerForm


Answer = Callable[[Taken], Awaitable[Response]]


class Routes:
    """Routes that take a place before they read the body, and keep it until their answer is sent."""

    def __init__(self, operations: Operations) -> None:
        self.router = APIRouter()
        self._operations = operations

    def post(self, path: str, operation: Operation) -> Callable[[Answer], Answer]:
        """Let a function answer a path's requests."""

        def register(answer: Answer) -> Answer:
            async def take(request: Request) -> Response:
                with self._operations.taken(operation, _length(request)) as ticket:
                    timer, form = Timer(), answer_form(request.headers.get("accept"))
                    body = await _body(request, ticket)
                    response = await answer(Taken(body, ticket, timer, _id(request), form))
                    return TicketedResponse(response, ticket.pass_on())

            self.router.add_api_route(path, take, methods=["POST"], name=answer.__name__)
            return answer

        return register


def generation_routes(operations: Operations) -> APIRouter:
    """Requests that an engine runs."""
    routes, front = Routes(operations), operations.front

    @routes.post("/v1/chat/completions", Operation.CHAT_COMPLETIONS)
    async def chat_completions(taken: Taken) -> Response:
        asked = await front.understand_chat(taken.body, taken.ticket, taken.request_id)
        if asked.body.stream:
            return _stream(await front.chat_stream(asked), taken)
        return _json(await front.chat(asked), taken)

    @routes.post("/v1/completions", Operation.COMPLETIONS)
    async def completions(taken: Taken) -> Response:
        asked = await front.understand_completion(taken.body, taken.ticket, taken.request_id)
        if asked.body.stream:
            return _stream(await front.completion_stream(asked), taken)
        return _json(await front.completion(asked), taken)

    @routes.post("/inference/v1/generate", Operation.GENERATE_FEATURES)
    async def generate(taken: Taken) -> Response:
        asked = await front.understand_generate(taken.body, taken.ticket, taken.request_id)
        if asked.body.stream:
            return _stream(await front.generate_stream(asked), taken)
        return _json(await front.generate(asked), taken)

    @routes.router.post("/inference/v1/abort_requests")
    async def abort_requests(request: Request) -> Response:
        await front.abort(await _body(request))
        return Response()

    return routes.router


def render_routes(operations: Operations) -> APIRouter:
    """Requests that are only rendered, or less."""
    routes, front = Routes(operations), operations.front

    @routes.post("/v1/chat/completions/render", Operation.RENDER_CHAT)
    async def render_chat(taken: Taken) -> Response:
        asked = await front.understand_chat(taken.body, taken.ticket, taken.request_id)
        return _bytes(await front.render_one_answer(Operation.RENDER_CHAT, asked, taken.form), taken)

    @routes.post("/v1/completions/render", Operation.RENDER_COMPLETION)
    async def render_completion(taken: Taken) -> Response:
        asked = await front.understand_completion(taken.body, taken.ticket, taken.request_id)
        return _bytes(await front.render_completion_answer(asked, taken.form), taken)

    @routes.post("/inference/v1/generate/render", Operation.RENDER_TOKENS)
    async def render_tokens(taken: Taken) -> Response:
        asked = await front.understand_tokens(taken.body, taken.ticket, taken.request_id)
        return _bytes(await front.render_one_answer(Operation.RENDER_TOKENS, asked, taken.form), taken)

    @routes.post("/tokenize", Operation.TOKENIZE)
    async def tokenize(taken: Taken) -> Response:
        return _json(await front.tokenize(taken.body, taken.ticket), taken)

    @routes.post("/detokenize", Operation.DETOKENIZE)
    async def detokenize(taken: Taken) -> Response:
        return _json(await front.detokenize(taken.body, taken.ticket), taken)

    @routes.post("/v1/chat/completions/derender", Operation.DERENDER)
    async def derender_chat(taken: Taken) -> Response:
        return _json(await front.derender(taken.body, taken.ticket, chat=True), taken)

    @routes.post("/v1/completions/derender", Operation.DERENDER)
    async def derender_completion(taken: Taken) -> Response:
        return _json(await front.derender(taken.body, taken.ticket, chat=False), taken)

    return routes.router


def information_routes(operations: Operations) -> APIRouter:
    """What is served, and by whom."""
    router = APIRouter()
    headers = _headers(Served(operations.record.tier, operations.record.replica))

    def answer(body: Any, status: int = 200) -> Response:
        return Response(orjson.dumps(body), status, headers, JSON)

    @router.get("/v1/models")
    async def models() -> Response:
        return answer(await operations.models())

    @router.get("/health")
    async def health() -> Response:
        tiers = await operations.health()
        well = serves(operations, tiers)
        body = {"status": "ok" if well else "unavailable", "tiers": tiers}
        return answer(body, 200 if well else 503)

    @router.post("/v1/clear_mm_cache")
    async def clear_mm_cache() -> Response:
        await operations.clear_mm_cache()
        return answer({"status": "ok"})

    return router


def serves(operations: Operations, tiers: Mapping[str, tuple[ReplicaReport, ...]]) -> bool:
    """Whether every operation of this application has a replica; engine replicas can stand in for the render tier.

    A replica under so much load that its report is late serves all the same.
    """
    front = operations.front
    tier = Tier.ENGINE if front.config.engine is not None and Tier.ENGINE in tiers else Tier.RENDER
    return bool(front.backend.running(tier))


class Timer:
    """Time since a request was taken, for `Server-Timing`."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def headers(self, served: Served) -> dict[str, str]:
        """Who served, and the milliseconds of its stages and of the whole request here."""
        stages = {**served.seconds, "total": time.perf_counter() - self._begun}
        timing = ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in stages.items())
        return {**_headers(served), "Server-Timing": timing}


class TicketedResponse(Response):
    """A response that keeps its request's place until its last byte is sent, or its client has left."""

    def __init__(self, response: Response, ticket: Ticket) -> None:
        self.status_code = response.status_code
        self.background = response.background
        self._response = response
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._ticket:
            await self._response(scope, receive, send)


async def _body(request: Request, ticket: Ticket | None = None) -> bytes:
    """The body of a JSON request; what was not announced counts from when it is there.

    Raises:
        BodyTooLargeError: See `edge.Edge`.
        OverloadedError: The body grows beyond what may be under way.
        SchemaError: It is not JSON by its content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise SchemaError(f"the content type must be {JSON}")
    if ticket is None or "content-length" in request.headers:
        return await request.body()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        ticket.resize(len(body))
    return bytes(body)


def _length(request: Request) -> int:
    """Bytes of the body as the client announces them; 0 where it does not. The server lets numbers alone through."""
    return int(request.headers.get("content-length", 0))


def _headers(served: Served) -> dict[str, str]:
    return {"X-Greenroom-Tier": served.tier, "X-Greenroom-Replica": served.replica}


def _id(request: Request) -> str | None:
    """The request's id, the client's or Serve's; Serve sends it back."""
    return request.headers.get("x-request-id")


def _json(reply: Reply[Any], taken: Taken) -> Response:
    return Response(orjson.dumps(reply.value), headers=taken.timer.headers(reply.served), media_type=JSON)


def _bytes(reply: Reply[Pieces], taken: Taken) -> Response:
    headers = {**taken.timer.headers(reply.served), "Vary": "Accept"}
    return PiecesResponse(reply.value, headers, MEDIA_TYPES[taken.form])


def _stream(reply: Reply[AsyncGenerator[Any]], taken: Taken) -> Response:
    events = _events(reply.value)
    return StreamingResponse(events, headers=taken.timer.headers(reply.served), media_type=EVENTS)


async def _events(chunks: AsyncGenerator[Any]) -> AsyncGenerator[bytes]:
    """Server-sent events; an error ends them, as the last event before the end."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield b"data: " + orjson.dumps(chunk) + b"\n\n"
    except asyncio.CancelledError:
        raise
    except Exception as error:
        metrics().broken_streams.inc()
        yield error_event(error)
    yield DONE

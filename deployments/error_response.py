"""The one translation of errors into answers, whichever transport carried them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from renderer.errors import AuthenticationError, BodyTooLargeError, GreenroomError, OverloadedError

logger = logging.getLogger("ray.serve.greenroom")

INTERNAL = GreenroomError("internal error; the server's log has the details under this request's id")
GONE = "the replica that served this request went away; try again"
CLIENT_LEFT = 499
HTTP_TYPES = {400: "BadRequestError", 404: "NotFoundError", 405: "MethodNotAllowedError"}


def translate(error: BaseException) -> GreenroomError:
    """Ours for any error. What a foreign one says stays in the log: it may name paths and addresses."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return translate(error.cause)
    match error:
        case GreenroomError():
            return error
        case BackPressureError():
            return OverloadedError("too many requests are waiting", max(1, round(error.retry_after_s or 1)))
        case DeploymentUnavailableError():
            return OverloadedError("no replica of a tier that this request needs is running", 5)
        case RayActorError():
            return OverloadedError(GONE)
        case _:
            return INTERNAL


def status_of(error: BaseException) -> int:
    """The HTTP status that an error stands for; 499 where the client has left, which none is sent for."""
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return CLIENT_LEFT
    return translate(error).status


def error_body(error: GreenroomError) -> dict[str, Any]:
    """OpenAI's error object; `code` is the status."""
    return _body(str(error), error.type, error.param, error.status)


def error_response(error: BaseException, headers: Mapping[str, str] | None = None) -> Response:
    ours = translate(error)
    if ours is INTERNAL:
        logger.error("request failed", exc_info=error)
    return _json(error_body(ours), ours.status, {**(headers or {}), **_own_headers(ours)})


def error_event(error: BaseException) -> bytes:
    """The last event of a stream that has begun, where a status can no longer be sent."""
    ours = translate(error)
    if ours is INTERNAL:
        logger.error("stream failed", exc_info=error)
    return b"data: " + orjson.dumps(error_body(ours)) + b"\n\n"


def add_error_handlers(app: FastAPI, headers: Mapping[str, str]) -> None:
    """Every error that leaves a route, and every address that is none, in OpenAI's form.

    Args:
        headers: Put on each of these answers.
    """

    async def ours(request: Request, error: Exception) -> Response:
        return error_response(error, headers)

    async def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = error.detail if isinstance(error, HTTPException) else INTERNAL.message
        own = (error.headers or {}) if isinstance(error, HTTPException) else {}
        message = f"{request.method} {request.url.path}: {detail}"
        return _json(
            _body(message, HTTP_TYPES.get(status, "BadRequestError"), None, status), status, {**headers, **own}
        )

    app.add_exception_handler(GreenroomError, ours)
    app.add_exception_handler(RayTaskError, ours)
    app.add_exception_handler(RayActorError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, ours)


def _own_headers(error: GreenroomError) -> dict[str, str]:
    """What HTTP asks of an answer with this status."""
    match error:
        case OverloadedError():
            return {"Retry-After": str(error.retry_after_s)}
        case AuthenticationError():
            return {"WWW-Authenticate": "Bearer"}
        case BodyTooLargeError():
            return {"Connection": "close"}  # what is left of the body is not read
        case _:
            return {}


def _body(message: str, kind: str, param: str | None, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _json(body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")

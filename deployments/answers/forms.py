"""The forms that an answer with tensors can have over HTTP, and which one a client wants."""

from __future__ import annotations

from typing import Literal

AnswerForm = Literal["json", "msgpack"]
MEDIA_TYPES: dict[AnswerForm, str] = {"json": "application/json", "msgpack": "application/x-msgpack"}
_NAMES = {"application/x-msgpack", "application/msgpack", "application/vnd.msgpack"}


def answer_form(accept: str | None) -> AnswerForm:
    """MessagePack for a client that names it and prefers nothing to it, JSON for any other.

    Args:
        accept: The request's `Accept` header.
    """
    weights = {"json": 0.0, "msgpack": 0.0}
    for entry in (accept or "").split(","):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        form = "msgpack" if kind in _NAMES else "json" if kind == MEDIA_TYPES["json"] else None
        if form is not None:
            weights[form] = max(weights[form], _weight(parameters))
    return "msgpack" if weights["msgpack"] > weights["json"] else "json"


def _weight(parameters: list[str]) -> float:
    """The parameter `q` of a media range, 1 where it has none."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0

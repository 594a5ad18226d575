"""Messages of a chat body, as the OpenAI API writes them, and what the renderer gets of them: no JSON, no base64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from renderer.conversation import ImagePart, Message, Part, TextPart
from renderer.errors import MediaError, RequestError, UnsupportedFieldError
from renderer.media import data_url_bytes

TEXT_TYPES = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
IMAGE_TYPES = frozenset({"image_url", "input_image"})
REMOTE_SCHEMES = frozenset({"http", "https", "file"})
MAX_SCHEME_CHARS = 8
DETAILS = (None, "auto", "low", "high")
# What a message may carry beside role and content: only the chat template reads it.
TEMPLATE_FIELDS = frozenset({"name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "refusal"})


class MessageBody(BaseModel):
    """One message; the parts of its content are checked one by one where they are converted, with better words."""

    model_config = ConfigDict(frozen=True, extra="allow")

    role: str
    content: str | list[Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_an_assistant_says_nothing(cls, data: Any) -> Any:
        """Null is no content; an assistant's that only calls tools has none."""
        says_nothing = isinstance(data, Mapping) and "content" in data and data["content"] is None
        if says_nothing and data.get("role") not in ("assistant", "function"):
            raise ValueError("content must not be null")
        return data


def conversation(bodies: Sequence[MessageBody]) -> tuple[Message, ...]:
    """Messages for the renderer, images numbered through the whole conversation.

    Raises:
        RequestError: A part lacks what its type needs.
        UnsupportedFieldError: A part or a field of a kind that is not supported.
        MediaError: An image's data cannot be decoded from the body.
    """
    numbers = iter(range(2**31))
    return tuple(_message(body, f"messages.{place}", numbers) for place, body in enumerate(bodies))


def image_part(url: str | None, uuid: str | None, index: int) -> ImagePart:
    """The image behind a URL of a request.

    Raises:
        MediaError: The URL is not one that images are taken from, or its data is not base64.
    """
    if not url:
        if uuid is None:
            raise MediaError("it has neither a URL nor a uuid", index)
        return ImagePart(uuid=uuid)
    scheme = url[:MAX_SCHEME_CHARS].partition(":")[0].lower()
    if scheme in REMOTE_SCHEMES:
        return ImagePart(url=url, uuid=uuid)
    if scheme != "data":
        raise MediaError("its URL must begin with data:, http:, https: or file:", index)
    return ImagePart(data=data_url_bytes(url, index), uuid=uuid)


def _message(body: MessageBody, place: str, numbers: Iterator[int]) -> Message:
    extra = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    for name, value in extra.items():
        if name not in TEMPLATE_FIELDS and value not in ([], {}):
            raise UnsupportedFieldError(f"{place}.{name} is not supported", f"{place}.{name}")
    if isinstance(body.content, list):
        parts = enumerate(body.content)
        content: str | tuple[Part, ...] | None = tuple(
            _part(part, f"{place}.content.{number}", numbers) for number, part in parts
        )
    else:
        content = body.content
    return Message(body.role, content, {name: value for name, value in extra.items() if name in TEMPLATE_FIELDS})


def _part(part: Any, place: str, numbers: Iterator[int]) -> Part:
    if not isinstance(part, Mapping):
        raise RequestError(f"{place} must be an object", place)
    kind = part.get("type", "image_url" if "image_url" in part else None)
    if kind is None:
        raise RequestError(f"{place} has no type", f"{place}.type")
    if not isinstance(kind, str):
        raise RequestError(f"{place}.type must be a string", f"{place}.type")
    if kind in TEXT_TYPES:
        return TextPart(_text(part, kind, place))
    if kind in IMAGE_TYPES:
        return image_part(_url(part, place), _uuid(part), next(numbers))
    raise UnsupportedFieldError(f"{place}: parts of type {kind[:64]!r} are not supported", f"{place}.type")


def _text(part: Mapping[str, Any], kind: str, place: str) -> str:
    field = kind if kind in ("refusal", "thinking") else "text"
    _only(part, ("type", field), place)
    text = part.get(field)
    if not isinstance(text, str):
        raise RequestError(f"{place}.{field} must be a string", f"{place}.{field}")
    return text


def _url(part: Mapping[str, Any], place: str) -> str | None:
    """The URL, given as a string or as `{"url": ..., "detail": ...}`; `detail` has no meaning for local models."""
    _only(part, ("type", "image_url", "detail", "uuid"), place)
    _detail(part, place)
    image_url = part.get("image_url")
    if isinstance(image_url, Mapping):
        _only(image_url, ("url", "detail"), f"{place}.image_url")
        _detail(image_url, f"{place}.image_url")
        image_url = image_url.get("url")
    if image_url is not None and not isinstance(image_url, str):
        raise RequestError(f"{place}.image_url must be a URL", f"{place}.image_url")
    return image_url


def _detail(part: Mapping[str, Any], place: str) -> None:
    if part.get("detail") not in DETAILS:
        raise RequestError(f"{place}.detail must be auto, low or high", f"{place}.detail")


def _uuid(part: Mapping[str, Any]) -> str | None:
    uuid = part.get("uuid")
    return None if uuid is None else str(uuid)


def _only(part: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for name, value in part.items():
        if name not in known and value is not None:
            raise UnsupportedFieldError(f"{place}.{name} is not supported", f"{place}.{name}")

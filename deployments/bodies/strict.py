"""The root of all bodies. Strict: a field that would change the answer and is not supported, or is unknown, is
refused by name; one that cannot change it is accepted. A null is the same as leaving a field out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from renderer.errors import SchemaError, UnsupportedFieldError

BodyT = TypeVar("BodyT", bound="Body")
Data = bytes | Mapping[str, Any] | BaseModel
TokenId = Annotated[int, Field(ge=0)]
MAX_ERRORS = 10
# No body needs more, and what is far deeper can neither be passed on nor be followed as a schema.
MAX_DEPTH = 100

# Accounting, routing hints and the like: no answer depends on them.
IGNORED = frozenset(
    {
        "user",
        "length_penalty",  # of beams, which are not searched
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "session_id",
    }
)
# What would change an answer and is not supported, with the values that mean "as if it were not there".
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "media_io_kwargs": ({},),
    "modalities": (["text"],),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class Strict(BaseModel):
    """An object of which every field is understood, ignored on purpose, or refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ignored: ClassVar[frozenset[str]] = IGNORED
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_understood(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {}
        for name, value in data.items():
            if value is None or name in cls.ignored:
                continue
            if name in cls.model_fields:
                known[name] = value
            elif name not in cls.unsupported:
                raise UnsupportedFieldError(f"unknown field {str(name)[:128]!r}", str(name)[:128])
            elif value not in cls.unsupported[name]:
                raise UnsupportedFieldError(f"{name} is not supported", name)
        return known


class Body(Strict):
    """Root of all bodies."""

    model: str | None = None


def parse(kind: type[BodyT], data: Data) -> BodyT:
    """A body out of its JSON, or out of what a handle's caller gave: a dict or a pydantic object of the same fields.

    Raises:
        SchemaError: It is not JSON, or not of this form; names the first field at fault.
        UnsupportedFieldError: Names the field.
    """
    if isinstance(data, kind):
        return data
    try:
        return kind.model_validate(loaded(data))
    except ValidationError as error:
        raise _schema_error(error) from error


def loaded(data: Data) -> Any:
    """What a body's bytes spell, or a body that a handle's caller gave, as plain objects.

    Raises:
        SchemaError: It is not JSON, or too deep.
    """
    plain = _plain(data)
    check_depth(plain, "body")
    return plain


def _plain(data: Data) -> Any:
    if isinstance(data, BaseModel):
        return data.model_dump(exclude_none=True)
    try:
        return orjson.loads(data) if isinstance(data, bytes) else data
    except orjson.JSONDecodeError as error:
        raise SchemaError(f"the body is not JSON: {error.msg} at character {error.pos}", f"body.{error.pos}") from error


def check_depth(value: Any, field: str) -> None:
    """
    Raises:
        SchemaError: It is nested more than `MAX_DEPTH` deep.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for value in level for part in _parts(value) if isinstance(part, (dict, list, tuple))]
        if not level:
            return
    raise SchemaError(f"{field} is nested more than {MAX_DEPTH} deep", field)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _schema_error(error: ValidationError) -> SchemaError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [f"{_path(entry['loc'])}: {entry['msg']}" for entry in found[:MAX_ERRORS]]
    if len(found) > MAX_ERRORS:
        lines.append(f"...and {len(found) - MAX_ERRORS} more")
    return SchemaError("; ".join(lines), _path(found[0]["loc"]))


def _path(place: tuple[int | str, ...]) -> str:
    """Dotted, without the names of types that pydantic puts in where a field takes several."""
    named = (
        str(part) for part in place if isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))
    )
    return ".".join(("body", *named))

"""The one tree of errors.

    GreenroomError                     500
    |- RequestError                    400   the caller's fault; names the field in `param`
    |  |- SchemaError                  400   the body does not have the form that the operation takes
    |  |- UnsupportedFieldError        400   a field that would change the answer and is not supported
    |  |- ContextLengthError           400   the prompt does not fit the model
    |  |- MediaError                   400   one media item cannot be used; names its index
    |  |  |- MediaUnreachableError     422   its address answers with an error, or not at all
    |  |  '- MediaForbiddenError       403   its address is not one that may be fetched
    |  |- CacheMissError               400   an item was sent by reference and is not held
    |  |- AuthenticationError          401
    |  |- BodyTooLargeError            413
    |  '- ModelNotFoundError           404
    |- NotSupportedError               501   this deployment has no part that could do it
    |- OverloadedError                 503   at the limit; says after how many seconds to come back
    |- IncompleteError                 503   some replicas did what all had to do
    |- EngineError                     500   the engine failed on this request alone
    |  '- EngineDeadError              503   the engine is gone; the request may be tried elsewhere
    |     '- EngineStartingError       503   it is not up yet, and has seen nothing of the request
    |- ConfigError                     500   raised at start only
    '- WarmupError                     500   raised at start only

`status` and `type` are the HTTP status and the `type` of the OpenAI error body. An instance crosses a Ray hop by
pickling, which calls the class with `args`: every constructor hands all its arguments to `Exception.__init__`.
"""

from typing import ClassVar


class GreenroomError(Exception):
    """Root of everything that Greenroom raises on purpose.

    Args:
        message: What happened and what to do about it, fit for the client to read.
        param: Path of the request field at fault, if there is one.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "InternalServerError"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class RequestError(GreenroomError):
    """The request cannot be served as it is; sending it again unchanged is of no use."""

    status = 400
    type = "BadRequestError"


class SchemaError(RequestError):
    """The body is not JSON, or not of the operation's form."""

    type = "Bad Request"


class UnsupportedFieldError(RequestError):
    """The field would change the answer and is not supported here, or is unknown."""


class ContextLengthError(RequestError):
    """The prompt, or the prompt and what is to be generated, exceeds the model's length."""


class MediaError(RequestError):
    """A media item cannot be used.

    Args:
        message: The reason, without anything of the internal network in it.
        index: Position of the item among the request's items of its modality, from 0.
        param: The request field that carried it.
    """

    def __init__(self, message: str, index: int, param: str | None = "image_url") -> None:
        Exception.__init__(self, message, index, param)
        self.message = message
        self.index = index
        self.param = param

    def __str__(self) -> str:
        return f"image {self.index}: {self.message}"


class MediaUnreachableError(MediaError):
    """The item's address answers with an error, too slowly, with too much, or not at all."""

    status = 422
    type = "UnprocessableEntityError"


class MediaForbiddenError(MediaError):
    """The item's address is of a scheme, or in a range, that may not be fetched."""

    status = 403
    type = "PermissionDeniedError"


class CacheMissError(RequestError):
    """An item came without data, and nothing is held under its hash."""


class AuthenticationError(RequestError):
    """No API key, or a wrong one."""

    status = 401
    type = "AuthenticationError"


class BodyTooLargeError(RequestError):
    """The body has more bytes than this deployment takes."""

    status = 413
    type = "RequestEntityTooLargeError"


class ModelNotFoundError(RequestError):
    """The request names a model that is not served here."""

    status = 404
    type = "NotFoundError"


class NotSupportedError(GreenroomError):
    """This deployment lacks the tier or the option that the operation needs."""

    status = 501
    type = "NotImplementedError"


class OverloadedError(GreenroomError):
    """At the limit of what is admitted.

    Args:
        message: Which limit was met.
        retry_after_s: Seconds after which another try makes sense.
    """

    status = 503
    type = "ServiceUnavailableError"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        Exception.__init__(self, message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = None


class IncompleteError(GreenroomError):
    """What every replica had to do was done by some."""

    status = 503
    type = "ServiceUnavailableError"


class EngineError(GreenroomError):
    """The engine failed on this request and is healthy otherwise."""


class EngineDeadError(EngineError):
    """The engine process is gone; nothing is known of the request beyond the tokens already received."""

    status = 503
    type = "ServiceUnavailableError"


class EngineStartingError(EngineDeadError):
    """The engine is not up yet; the request was not submitted, so it has no part in what happened to the engine."""


class ConfigError(GreenroomError):
    """The configuration, or the checkpoint that it names, cannot be served."""


class WarmupError(GreenroomError):
    """A warm-up step failed under `warmup: strict`: the replica must not go live."""

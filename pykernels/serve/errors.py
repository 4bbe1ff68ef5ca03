"""What a request is refused for, and how each protocol says it."""

from __future__ import annotations

__all__ = [
    "Denied",
    "Expired",
    "Forbidden",
    "Invalid",
    "NotFound",
    "Overloaded",
    "Refused",
    "TooLarge",
    "Unavailable",
    "Unsupported",
]


class Refused(Exception):
    """A request that is not answered; the message is for the client, and names the input that is wrong.

    Attributes:
        status: of HTTP.
        code: of gRPC, by name.
        retry_after: seconds after which it may be sent again; None where that would not help.
    """

    status = 500
    code = "INTERNAL"

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Invalid(Refused):
    """The request cannot be right, whatever the server does."""

    status, code = 400, "INVALID_ARGUMENT"


class Denied(Refused):
    """No token, or another one."""

    status, code = 401, "UNAUTHENTICATED"


class Forbidden(Refused):
    """Something that this server does for nobody."""

    status, code = 403, "PERMISSION_DENIED"


class NotFound(Refused):
    """No such model or version."""

    status, code = 404, "NOT_FOUND"


class TooLarge(Refused):
    """More bytes than a request may have."""

    status, code = 413, "INVALID_ARGUMENT"


class Overloaded(Refused):
    """Too much waits already."""

    status, code = 429, "RESOURCE_EXHAUSTED"


class Unsupported(Refused):
    """A part of the protocol that is not offered."""

    status, code = 501, "UNIMPLEMENTED"


class Unavailable(Refused):
    """Not now: it stops, or the model cannot be loaded."""

    status, code = 503, "UNAVAILABLE"


class Expired(Refused):
    """The request's own time was over before it was its turn."""

    status, code = 504, "DEADLINE_EXCEEDED"

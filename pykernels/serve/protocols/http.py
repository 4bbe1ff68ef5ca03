"""What the protocols over HTTP share: bodies within bounds, compression, clients that hang up, errors."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import pydantic
import pydantic_core
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pykernels.serve.budget import Held
from pykernels.serve.errors import Denied, Invalid, Refused, Unsupported
from pykernels.serve.service import Service

__all__ = [
    "ERRORS",
    "MODEL",
    "Gone",
    "Routes",
    "TokenCheck",
    "encoded",
    "error",
    "json_bytes",
    "json_response",
    "parse",
    "read",
    "while_there",
]

T = TypeVar("T")
M = TypeVar("M", bound=pydantic.BaseModel)
F = TypeVar("F", bound=Callable[..., Awaitable[Response]])
MODEL = ("/models/{name}", "/models/{name}/versions/{version}")
OPEN = ("/v2/health/live", "/v2/health/ready", "/ping")  # without a token
CODINGS = {"gzip": 31, "deflate": 15}  # zlib's number for each form
CHUNK = 1 << 20
log = logging.getLogger(__name__)


class Gone(Exception):
    """The client hung up."""


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON; NaN and infinities as JavaScript writes them."""
    text = pydantic_core.to_json(content, inf_nan_mode="constants")
    return Response(text, status, headers, media_type="application/json")


def error(refused: Refused) -> Response:
    """An error as all of these protocols tell it."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    if isinstance(refused, Denied):
        headers["WWW-Authenticate"] = "Bearer"
    return json_response({"error": str(refused)}, refused.status, headers)


def parse(kind: type[M], text: bytes) -> M:
    """A request's JSON.

    Raises:
        Invalid: it is no JSON, or not what the protocol says; the message says where.
    """
    try:
        return kind.model_validate_json(text)
    except pydantic.ValidationError as failure:
        first = failure.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Invalid(f"request{': ' if place else ''}{place:.200}: {first['msg']:.200}") from None


async def read(request: Request, held: Held, header: str | None = None) -> bytearray:
    """A request's body, decompressed.

    Args:
        header: what the client says of the length of its JSON; all is JSON where that is None, or no length.

    Raises:
        TooLarge, Overloaded: there is no room for it.
        Unsupported: it is compressed in another way than gzip or deflate.
        Invalid: what is compressed is damaged.
        Gone: the client hung up before the end.
    """
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in (*CODINGS, "identity"):
        raise Unsupported(f"Content-Encoding {coding!r:.80} is none of {', '.join(CODINGS)}")
    length = request.headers.get("content-length", "")
    declared = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
    held.grow(declared)  # before anything of it is read
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        if len(body) + len(part) > declared:
            held.grow(len(body) + len(part) - max(declared, len(body)))
        body += part
        if not message.get("more_body"):
            break
    if coding != "identity":
        body = await asyncio.to_thread(_decompress, body, coding, held)
    held.parse(json_bytes(body, header))
    return body


def json_bytes(body: bytes | bytearray, header: str | None) -> int:
    """How much of a body is JSON, as `read` has it."""
    text = int(header) if header and header.isascii() and header.isdigit() and len(header) < 20 else len(body)
    return min(text, len(body))


def _decompress(body: bytearray, coding: str, held: Held) -> bytearray:
    """What was compressed; never more than `held` may grow by."""
    stream = zlib.decompressobj(CODINGS[coding])
    found, rest = bytearray(), bytes(body)
    try:
        while rest and not stream.eof:
            part = stream.decompress(rest, CHUNK)
            held.grow(len(part))
            found += part
            rest = stream.unconsumed_tail
        part = stream.flush()
    except zlib.error as failure:
        raise Invalid(f"request: the {coding} body is damaged: {failure}") from failure
    held.grow(len(part))
    found += part
    if not stream.eof or stream.unused_data:
        raise Invalid(f"request: the {coding} body is truncated, or something follows it")
    return found


async def encoded(request: Request, response: Response) -> Response:
    """An answer compressed, if the client takes one coding alone, as `tritonclient` does when it is told to. Others,
    browsers say, list what they could read, and compressing numbers takes longer than sending them."""
    wanted = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept-encoding", "").split(",")]
    if len(wanted) == 1 and wanted[0] in CODINGS:
        body = bytes(response.body)
        packer = zlib.compressobj(1, zlib.DEFLATED, CODINGS[wanted[0]])
        response.body = await asyncio.to_thread(lambda: packer.compress(body) + packer.flush())
        response.headers["content-encoding"] = wanted[0]
        response.headers["content-length"] = str(len(response.body))
    return response


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. The request's body must have been read.

    Raises:
        Gone: it hung up.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Routes(list[Route]):
    """Routes of an application.

    Args:
        prefix: what all their paths begin with.
    """

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix

    def at(self, method: str, *paths: str) -> Callable[[F], F]:
        """A decorator: the function answers these paths; it is given the request, and what stands in the path for each
        name in braces."""

        def add(function: F) -> F:
            async def endpoint(request: Request) -> Response:
                return await function(request, **request.path_params)

            self.extend(Route(self.prefix + path, endpoint, methods=[method]) for path in paths)
            return function

        return add


async def _refused(_: Request, failure: Refused) -> Response:
    return error(failure)


async def _unknown(request: Request, failure: HTTPException) -> Response:
    return json_response({"error": f"{request.method} {request.url.path:.200}: {failure.detail}"}, failure.status_code)


async def _gone(_: Request, __: Gone) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's number in the logs


async def _failed(_: Request, failure: Exception) -> Response:
    return json_response({"error": "the service failed; its log says how"}, 500)


# Every error of an application as one that clients of these protocols understand.
ERRORS: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
    Refused: _refused,
    HTTPException: _unknown,
    Gone: _gone,
    Exception: _failed,
}


class TokenCheck:
    """Lets only requests through that bring the service's token, but for those about health.

    Args:
        app: what they are let through to.
        service: whose token; asked at each request.
    """

    def __init__(self, app: ASGIApp, service: Callable[[], Service]) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                self.service().token.check(dict(scope["headers"]).get(b"authorization"))
            except Denied as denied:
                await error(denied)(scope, receive, send)
                return
        await self.app(scope, receive, send)

"""SageMaker's containers: ``/ping`` and ``/invocations``, whose bodies are those of the other protocols."""

from __future__ import annotations

import re
from collections.abc import Callable

import pydantic_core
from starlette.requests import Request
from starlette.responses import Response

from pykernels.serve.errors import Invalid, Refused
from pykernels.serve.model import Model
from pykernels.serve.protocols import http_v2, tensorflow
from pykernels.serve.protocols.http import Routes, encoded, parse, read, while_there
from pykernels.serve.service import Service

__all__ = ["router"]

BINARY = re.compile(r"application/vnd\.sagemaker-triton\.binary\+json\s*;\s*json-header-size=([0-9]{1,19})")
MODEL = "X-Amzn-SageMaker-Target-Model"


class WrongType(Refused):
    """A body of a type that is not read here."""

    status, code = 415, "INVALID_ARGUMENT"


def router(service: Callable[[], Service]) -> Routes:
    """The two routes.

    Args:
        service: who answers; asked at each request.
    """
    routes = Routes()

    @routes.at("GET", "/ping")
    async def ping(_: Request) -> Response:
        return Response(status_code=200 if service().ready else 503)

    @routes.at("POST", "/invocations")
    async def invocations(request: Request) -> Response:
        kind = request.headers.get("content-type", "").strip()
        binary = BINARY.fullmatch(kind)
        model = await _model(service(), request.headers.get(MODEL))
        with service().budget.hold() as held:
            with model.queue.reading():
                body = await read(request, held, None if binary is None else binary[1])
            answer = await while_there(request, _answer(service(), model, body, kind))
            return await encoded(request, answer)

    return routes


async def _answer(service: Service, model: Model, body: bytearray, kind: str) -> Response:
    """By the type of the body: JSON of the Open Inference Protocol (its inputs are a list of objects with names) or of
    TensorFlow Serving; or Triton's form of the former with tensors as bytes behind it."""
    binary = BINARY.fullmatch(kind)
    if binary is not None:
        answer = await http_v2.response(service, model, http_v2.call_of(body, binary[1]))
        if http_v2.HEADER in answer.headers:
            size = answer.headers[http_v2.HEADER]
            answer.headers["content-type"] = f"application/vnd.sagemaker-triton.binary+json;json-header-size={size}"
        return answer
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise WrongType(f"Content-Type {kind!r:.80} is not read here: application/json is")
    if _is_v2(body):
        return await http_v2.response(service, model, http_v2.call_of(body, None))
    return await tensorflow.predict(service, model, parse(tensorflow.Prediction, bytes(body)))


def _is_v2(body: bytearray) -> bool:
    try:
        content = pydantic_core.from_json(bytes(body))
    except ValueError:
        return False
    inputs = content.get("inputs") if isinstance(content, dict) else None
    return isinstance(inputs, list) and bool(inputs) and all(isinstance(x, dict) and "datatype" in x for x in inputs)


async def _model(service: Service, name: str | None) -> Model:
    names = sorted({name for name, _ in service.repository.entries})
    if name is None and len(names) != 1:
        raise Invalid(f"the header {MODEL} must say which model: {', '.join(names):.200}")
    return await service.repository.get(names[0] if name is None else name)

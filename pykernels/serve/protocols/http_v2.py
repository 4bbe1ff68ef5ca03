"""The Open Inference Protocol, version 2, over HTTP: JSON, and tensors as bytes behind it (the binary tensor
extension)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from pykernels.serve.errors import Invalid, Unavailable, Unsupported
from pykernels.serve.model import Model
from pykernels.serve.protocols import v2
from pykernels.serve.protocols.http import MODEL, Routes, encoded, json_response, parse, read, while_there
from pykernels.serve.protocols.tensors import from_bytes, from_list, to_bytes, to_list
from pykernels.serve.service import Service

__all__ = ["HEADER", "call_of", "response", "router"]

HEADER = "Inference-Header-Content-Length"
ABSENT = ("/v2/trace/setting", "/v2/logging", "/v2/systemsharedmemory", "/v2/cudasharedmemory")
Parameters = dict[str, Any]


class Tensor(BaseModel):
    """An input of a request."""

    model_config = ConfigDict(strict=True)

    name: str
    shape: list[Annotated[int, Field(ge=0)]]
    datatype: str
    parameters: Parameters = {}
    data: Any = None


class Wanted(BaseModel):
    """An output that a request wants."""

    model_config = ConfigDict(strict=True)

    name: str
    parameters: Parameters = {}


class Inference(BaseModel):
    """The JSON of a request."""

    model_config = ConfigDict(strict=True)

    id: str = ""
    parameters: Parameters = {}
    inputs: list[Tensor]
    outputs: list[Wanted] = []


class Control(BaseModel):
    """The JSON of a request that loads or unloads a model, or asks for the index."""

    model_config = ConfigDict(strict=True)

    ready: bool = False
    parameters: Parameters = {}


def call_of(body: bytearray, header: str | None) -> v2.Call:
    """A request's body as a call.

    Args:
        header: the length of the JSON before the bytes of tensors; None where all is JSON.

    Raises:
        Invalid, Unsupported: what is wrong with it; the message names the input.
    """
    length = len(body)
    if header is not None:
        if not (header.isascii() and header.isdigit() and len(header) < 20 and 0 < int(header) <= len(body)):
            raise Invalid(f"{HEADER}: {header!r:.80} is not the length of the JSON in a body of {len(body)} bytes")
        length = int(header)
    request = parse(Inference, bytes(body[:length]))
    v2.refuse(request.parameters)
    binary = request.parameters.get("binary_data_output") is True
    call = v2.Call(request.id, {}, time_limit=v2.time_limit(request.parameters), binary=binary)
    for wanted in request.outputs:
        v2.refuse(wanted.parameters)
        call.outputs[wanted.name] = wanted.parameters.get("binary_data", binary) is True
    place = length
    for x in request.inputs:
        v2.refuse(x.parameters)
        size = x.parameters.get("binary_data_size")
        if x.name in call.inputs:
            raise Invalid(f"input {x.name!r:.80} is there twice")
        if size is None:
            if x.data is None:
                raise Invalid(f"input {x.name!r:.80} has neither data nor binary_data_size")
            call.inputs[x.name] = from_list(x.name, x.datatype, x.shape, x.data)
            continue
        if type(size) is not int or not 0 <= size <= len(body) - place:
            left = len(body) - place
            raise Invalid(
                f"input {x.name!r:.80}: binary_data_size {size!r:.80} does not fit into {left} bytes that are left"
            )
        if x.data is not None:
            raise Invalid(f"input {x.name!r:.80} has both data and binary_data_size")
        call.inputs[x.name] = from_bytes(x.name, x.datatype, x.shape, memoryview(body)[place : place + size])
        place += size
    if place != len(body):
        raise Invalid(f"request: {len(body) - place} bytes follow that belong to no input")
    return call


async def response(service: Service, model: Model, call: v2.Call) -> Response:
    """The answer to a call.

    Raises:
        Refused: in one of its kinds.
    """
    found = await call.answer(service, model)
    content: dict[str, Any] = {"model_name": model.name, "model_version": str(model.version)}
    if call.id:
        content["id"] = call.id
    parts: list[bytes] = []
    content["outputs"] = []
    datatypes = {spec.name: spec.datatype for spec in model.signature.outputs}
    for name, y in found.items():
        output: dict[str, Any] = {"name": name, "datatype": datatypes[name], "shape": list(y.shape)}
        if call.outputs.get(name, call.binary):
            parts.append(to_bytes(y))
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            output["data"] = to_list(y)
        content["outputs"].append(output)
    if not parts:
        return json_response(content)
    text = pydantic_core.to_json(content, inf_nan_mode="constants")
    return Response(b"".join([text, *parts]), headers={HEADER: str(len(text))}, media_type="application/octet-stream")


def router(service: Callable[[], Service]) -> Routes:
    """The routes below ``/v2``.

    Args:
        service: who answers; asked at each request.
    """
    routes = Routes("/v2")

    @routes.at("GET", "/health/live")
    async def live(_: Request) -> Response:
        return Response(status_code=200 if service().live else 503)

    @routes.at("GET", "/health/ready")
    async def ready(_: Request) -> Response:
        return Response(status_code=200 if service().ready else 503)

    @routes.at("GET", "")
    async def server(_: Request) -> Response:
        return json_response(v2.server())

    @routes.at("GET", "/models/stats")
    async def all_statistics(_: Request) -> Response:
        return json_response(v2.statistics(service()))

    _model_routes(routes, service)

    @routes.at("POST", "/repository/index")
    async def index(request: Request) -> Response:
        return json_response(v2.index(service(), (await _control(request, service())).ready))

    @routes.at("POST", "/repository/models/{name}/load")
    async def load(request: Request, name: str) -> Response:
        await v2.load(service(), name, (await _control(request, service())).parameters)
        return json_response({})

    @routes.at("POST", "/repository/models/{name}/unload")
    async def unload(request: Request, name: str) -> Response:
        await _control(request, service())  # unload_dependents: no model has any
        v2.unload(service(), name)
        return json_response({})

    @routes.at("GET", "/{rest:path}")
    @routes.at("POST", "/{rest:path}")
    async def absent(_: Request, rest: str) -> Response:
        if f"/v2/{rest}".startswith(ABSENT) or rest.endswith("/trace/setting"):
            raise Unsupported(f"/v2/{rest:.100}: tracing, logging and shared memory are not offered")
        return json_response({"error": f"/v2/{rest:.100}: not found"}, 404)

    return routes


def _model_routes(routes: Routes, service: Callable[[], Service]) -> None:
    @routes.at("GET", *MODEL)
    async def metadata(_: Request, name: str, version: str = "") -> Response:
        return json_response(v2.metadata(service(), await service().repository.get(name, version)))

    @routes.at("GET", *(f"{path}/ready" for path in MODEL))
    async def ready(_: Request, name: str, version: str = "") -> Response:
        if not service().repository.known(name, version):
            raise Unavailable(f"model {name!r} is not ready")
        return Response(status_code=200)

    @routes.at("GET", *(f"{path}/config" for path in MODEL))
    async def config(_: Request, name: str, version: str = "") -> Response:
        return json_response(v2.config(service(), await service().repository.get(name, version)))

    @routes.at("GET", *(f"{path}/stats" for path in MODEL))
    async def statistics(_: Request, name: str, version: str = "") -> Response:
        return json_response(v2.statistics(service(), name, version))

    @routes.at("POST", *(f"{path}/infer" for path in MODEL))
    async def infer(request: Request, name: str, version: str = "") -> Response:
        model = await service().repository.get(name, version)
        with service().budget.hold() as held:
            with model.queue.reading():
                body = await read(request, held, request.headers.get(HEADER))
            call = call_of(body, request.headers.get(HEADER))
            return await encoded(request, await while_there(request, response(service(), model, call)))


async def _control(request: Request, service: Service) -> Control:
    with service.budget.hold() as held:
        body = await read(request, held)
        return parse(Control, bytes(body)) if body.strip() else Control()

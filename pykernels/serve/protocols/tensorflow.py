"""TensorFlow Serving's REST form, which KServe calls version 1: ``/v1/models/NAME:predict``, in rows or columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from pykernels.serve.errors import Invalid
from pykernels.serve.model import Model
from pykernels.serve.protocols.http import MODEL, Routes, encoded, json_response, parse, read, while_there
from pykernels.serve.protocols.tensors import from_list
from pykernels.serve.service import Service

__all__ = ["Prediction", "predict", "router"]

STATES = {"READY": "AVAILABLE", "LOADING": "LOADING", "UNAVAILABLE": "START"}


class Prediction(BaseModel):
    """The JSON of a request: either rows or columns."""

    model_config = ConfigDict(strict=True)

    signature_name: str = "serving_default"
    instances: list[Any] | None = None
    inputs: Any = None


async def predict(service: Service, model: Model, request: Prediction) -> Response:
    """The answer, in the form of the request.

    Raises:
        Refused: in one of its kinds; the message names the input that is wrong.
    """
    if (request.instances is None) == (request.inputs is None):
        raise Invalid("request: either 'instances' or 'inputs' is needed")
    if request.signature_name != "serving_default":
        raise Invalid(f"request: signature_name {request.signature_name!r:.80} is unknown; there is serving_default")
    rows = request.instances is not None
    columns = _columns(model, request.instances) if request.instances is not None else _named(model, request.inputs)
    known = {spec.name: spec for spec in model.signature.inputs}
    inputs = {}
    for name, data in columns.items():
        if name not in known:
            raise Invalid(f"input {name!r:.80} is unknown; the inputs are {', '.join(known)}")
        inputs[name] = from_list(name, known[name].datatype, None, data)
    found = {name: y.tolist() for name, y in (await service.infer(model, inputs)).items()}
    if not rows:
        return json_response({"outputs": next(iter(found.values())) if len(found) == 1 else found})
    if len(found) == 1:
        return json_response({"predictions": next(iter(found.values()))})
    if any(not isinstance(y, list) or len(y) != len(request.instances or ()) for y in found.values()):
        raise Invalid("request: an output does not have the rows of 'instances'; ask by 'inputs'")
    return json_response(
        {"predictions": [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]}
    )


def _named(model: Model, data: Any) -> dict[str, Any]:
    """Data by names of inputs: those of an object, or those of the only input there is."""
    if isinstance(data, dict):
        return data
    if len(model.signature.inputs) != 1:
        raise Invalid(f"request: inputs by name are needed: {', '.join(s.name for s in model.signature.inputs)}")
    return {model.signature.inputs[0].name: data}


def _columns(model: Model, instances: list[Any]) -> dict[str, Any]:
    """Rows as columns."""
    named = [_named(model, instance) for instance in instances]
    if not named:
        raise Invalid("request: 'instances' is empty")
    if any(row.keys() != named[0].keys() for row in named):
        raise Invalid("request: the rows of 'instances' name different inputs")
    return {name: [row[name] for row in named] for name in named[0]}


def router(service: Callable[[], Service]) -> Routes:
    """The routes below ``/v1``.

    Args:
        service: who answers; asked at each request.
    """
    routes = Routes("/v1")

    @routes.at("GET", *MODEL)
    async def status(_: Request, name: str, version: str = "") -> Response:
        wanted = service().repository.keys(name, version)
        found = []
        for state in service().repository.index():
            if (state.name, state.version) in wanted:
                failed = state.state == "UNAVAILABLE" and state.reason != "not loaded yet"
                told = {"error_code": "UNKNOWN" if failed else "OK", "error_message": state.reason if failed else ""}
                found.append(
                    {"version": str(state.version), "state": "END" if failed else STATES[state.state], "status": told}
                )
        return json_response({"model_version_status": found})

    @routes.at("POST", *(f"{path}:predict" for path in MODEL))
    async def predicted(request: Request, name: str, version: str = "") -> Response:
        model = await service().repository.get(name, version)
        with service().budget.hold() as held:
            with model.queue.reading():
                body = await read(request, held)
            prediction = parse(Prediction, bytes(body))
            return await encoded(request, await while_there(request, predict(service(), model, prediction)))

    return routes

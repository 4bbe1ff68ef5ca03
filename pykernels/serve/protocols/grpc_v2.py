"""The Open Inference Protocol, version 2, over gRPC, on the messages and stubs that `tritonclient` brings."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from pykernels.serve.errors import Invalid, NotFound, Refused
from pykernels.serve.protocols import v2
from pykernels.serve.protocols.tensors import from_bytes, from_list, to_bytes
from pykernels.serve.service import Service

__all__ = ["OPEN", "UNARY", "Answers", "authorization", "call_of", "response"]

log = logging.getLogger(__name__)
# Where a tensor's numbers stand in a message when they are not raw.
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def call_of(request: pb.ModelInferRequest) -> v2.Call:
    """A request as a call.

    Raises:
        Invalid, Unsupported: what is wrong with it; the message names the input.
    """
    parameters = _plain(request.parameters)
    v2.refuse(parameters)
    call = v2.Call(request.id, {}, time_limit=v2.time_limit(parameters), binary=True)
    for wanted in request.outputs:
        v2.refuse(_plain(wanted.parameters))
        call.outputs[wanted.name] = True
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Invalid(f"raw_input_contents: {len(raw)} entries for {len(request.inputs)} inputs")
    for i, x in enumerate(request.inputs):
        v2.refuse(_plain(x.parameters))
        if x.name in call.inputs:
            raise Invalid(f"input {x.name!r:.80} is there twice")
        if raw:
            if x.HasField("contents"):
                raise Invalid(f"input {x.name!r:.80} has both contents and raw_input_contents")
            call.inputs[x.name] = from_bytes(x.name, x.datatype, x.shape, raw[i])
            continue
        field = CONTENTS.get(x.datatype)
        if field is None:
            raise Invalid(f"input {x.name!r:.80}: datatype {x.datatype!r:.80} is sent in raw_input_contents alone")
        other = [descriptor.name for descriptor, _ in x.contents.ListFields() if descriptor.name != field]
        if other:
            raise Invalid(f"input {x.name!r:.80} of {x.datatype} belongs in {field}, not {other[0]}")
        call.inputs[x.name] = from_list(x.name, x.datatype, x.shape, list(getattr(x.contents, field)))
    return call


async def response(service: Service, request: pb.ModelInferRequest, remaining: float | None) -> pb.ModelInferResponse:
    """The answer to a request.

    Args:
        remaining: seconds until the client's deadline; None without one.

    Raises:
        Refused: in one of its kinds.
    """
    model = await service.repository.get(request.model_name, request.model_version)
    call = call_of(request)
    call.time_limit = min(call.time_limit, math.inf if remaining is None else remaining)
    found = await call.answer(service, model)
    answer = pb.ModelInferResponse(model_name=model.name, model_version=str(model.version), id=request.id)
    datatypes = {spec.name: spec.datatype for spec in model.signature.outputs}
    for name, y in found.items():
        answer.outputs.add(name=name, datatype=datatypes[name], shape=list(y.shape))
        answer.raw_output_contents.append(to_bytes(y))
    return answer


class Answers:
    """Each call of the protocol, from its message to its answer, whichever server brings it.

    Args:
        service: who answers; asked at each request.
    """

    def __init__(self, service: Callable[[], Service]) -> None:
        self.service = service

    async def ServerLive(self, _: pb.ServerLiveRequest) -> Message:
        return pb.ServerLiveResponse(live=self.service().live)

    async def ServerReady(self, _: pb.ServerReadyRequest) -> Message:
        return pb.ServerReadyResponse(ready=self.service().ready)

    async def ModelReady(self, request: pb.ModelReadyRequest) -> Message:
        ready = False
        with contextlib.suppress(NotFound):
            ready = self.service().repository.known(request.name, request.version)
        return pb.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, _: pb.ServerMetadataRequest) -> Message:
        return ParseDict(v2.server(), pb.ServerMetadataResponse())

    async def ModelMetadata(self, request: pb.ModelMetadataRequest) -> Message:
        model = await self.service().repository.get(request.name, request.version)
        return ParseDict(v2.metadata(self.service(), model), pb.ModelMetadataResponse())

    async def ModelConfig(self, request: pb.ModelConfigRequest) -> Message:
        model = await self.service().repository.get(request.name, request.version)
        return ParseDict({"config": v2.config(self.service(), model)}, pb.ModelConfigResponse())

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> Message:
        found = v2.statistics(self.service(), request.name, request.version)
        return ParseDict(found, pb.ModelStatisticsResponse())

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest) -> Message:
        return ParseDict({"models": v2.index(self.service(), request.ready)}, pb.RepositoryIndexResponse())

    async def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest) -> Message:
        await v2.load(self.service(), request.model_name, _plain(request.parameters))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: pb.RepositoryModelUnloadRequest) -> Message:
        v2.unload(self.service(), request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: pb.ModelInferRequest, remaining: float | None) -> Message:
        with self.service().budget.hold() as held:
            held.grow(request.ByteSize())
            return await response(self.service(), request, remaining)

    async def stream(self, request: pb.ModelInferRequest, remaining: float | None) -> Message:
        """An answer in a stream, in which an error ends nothing."""
        try:
            return pb.ModelStreamInferResponse(infer_response=await self.ModelInfer(request, remaining))
        except Refused as refused:
            answer = pb.ModelStreamInferResponse(error_message=str(refused))
            answer.infer_response.id = request.id
            return answer


UNARY = [name for name in vars(Answers) if name[0].isupper() and name != "ModelInfer"]
OPEN = ("ServerLive", "ServerReady")  # without a token


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The protocol for a server of `grpc.aio`; what it does not name is answered as unimplemented.

    Args:
        service: who answers; asked at each request.
    """

    def __init__(self, service: Callable[[], Service]) -> None:
        self.answers, self.service = Answers(service), service
        for name in UNARY:
            setattr(self, name, self._unary(name))

    def _unary(self, name: str) -> Callable[[Message, grpc.aio.ServicerContext], Any]:
        async def answer(request: Message, context: grpc.aio.ServicerContext) -> Message | None:
            return await self._told(context, getattr(self.answers, name)(request), checked=name not in OPEN)

        return answer

    async def ModelInfer(self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext) -> Message | None:
        return await self._told(context, self.answers.ModelInfer(request, context.time_remaining()))

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Message]:
        async for request in requests:
            answer = await self._told(context, self.answers.stream(request, context.time_remaining()))
            if answer is not None:
                yield answer

    async def _told(self, context: grpc.aio.ServicerContext, work: Any, checked: bool = True) -> Message | None:
        """An answer, or the error in gRPC's form."""
        try:
            if checked:
                self.service().token.check(authorization(context.invocation_metadata()))
            return await work
        except Refused as refused:
            metadata = () if refused.retry_after is None else (("retry-after", str(refused.retry_after)),)
            await context.abort(getattr(grpc.StatusCode, refused.code), str(refused), metadata)
        except Exception:
            log.exception("a request failed")
            await context.abort(grpc.StatusCode.INTERNAL, "the service failed; its log says how")
        finally:
            work.close()
        return None


def authorization(metadata: Any) -> bytes | None:
    found = {key: value for key, value in metadata or ()}.get("authorization")
    return found.encode() if isinstance(found, str) else found


def _plain(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Parameters of a message as what they stand for."""
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None) for name, value in parameters.items()
    }


def options(service: Service) -> Iterator[tuple[str, int]]:
    """What a server must be told so that requests as large as the service's bound come through."""
    yield "grpc.max_receive_message_length", service.options.request_bytes
    yield "grpc.max_send_message_length", -1

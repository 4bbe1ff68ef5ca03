"""Jobs: an inference of the Open Inference Protocol that is submitted, polled and fetched."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from pykernels.serve.jobs import Jobs
from pykernels.serve.protocols.http import MODEL, Routes, encoded, json_response, read
from pykernels.serve.protocols.http_v2 import HEADER, call_of
from pykernels.serve.service import Service

__all__ = ["router"]


def router(service: Callable[[], Service], jobs: Callable[[], Jobs]) -> Routes:
    """The routes below ``/v2`` that end in ``jobs``, or begin with it.

    Args:
        service: which networks there are; asked at each request.
        jobs: who takes them; asked at each request.
    """
    routes = Routes("/v2")

    def state(job: str, status: str, code: int) -> Response:
        return json_response({"id": job, "status": status}, code, {"Location": f"/v2/jobs/{job}"})

    @routes.at("POST", *(f"{path}/jobs" for path in MODEL))
    async def submit(request: Request, name: str, version: str = "") -> Response:
        model = await service().repository.get(name, version)
        with service().budget.hold() as held:
            header = request.headers.get(HEADER)
            body = await read(request, held, header)
            model.request(call_of(body, header).inputs)  # what is wrong is told now
            return state(await jobs().submit(name, version, header, bytes(body)), "queued", 202)

    @routes.at("GET", "/jobs/{job}")
    async def status(_: Request, job: str) -> Response:
        return state(job, await jobs().status(job), 200)

    @routes.at("GET", "/jobs/{job}/result")
    async def result(request: Request, job: str) -> Response:
        status, answer = await jobs().result(job)
        if answer is None:
            failed = status == "failed"
            return state(job, status, 500 if failed else 202)
        code, headers, body = answer
        return await encoded(request, Response(body, code, headers))

    @routes.at("DELETE", "/jobs/{job}")
    async def drop(_: Request, job: str) -> Response:
        await jobs().drop(job)
        return Response(status_code=204)

    return routes

"""The HTTP application: all protocols that are spoken over HTTP, for whichever engine runs it."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware

from pykernels.serve.jobs import Jobs
from pykernels.serve.protocols import http_v2, metrics, sagemaker, tensorflow
from pykernels.serve.protocols import jobs as job_routes
from pykernels.serve.protocols.http import ERRORS, Routes, TokenCheck
from pykernels.serve.service import Service

__all__ = ["application"]


def application(service: Callable[[], Service], jobs: Callable[[], Jobs] | None = None) -> Starlette:
    """The application.

    Args:
        service: who answers; asked at each request, so that it may be made on the engine's own event loop.
        jobs: who takes jobs, asked at each request; None where there are none.
    """
    routes = Routes()
    if jobs is not None:
        routes += job_routes.router(service, jobs)
    for protocol in (metrics, sagemaker, tensorflow, http_v2):
        routes += protocol.router(service)
    return Starlette(routes=routes, middleware=[Middleware(TokenCheck, service=service)], exception_handlers=ERRORS)

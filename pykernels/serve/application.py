"""The HTTP application: all protocols that are spoken over HTTP, for whichever engine runs it."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from pykernels.serve.jobs import Jobs
from pykernels.serve.protocols import http_v2, metrics, sagemaker, tensorflow
from pykernels.serve.protocols import jobs as job_routes
from pykernels.serve.protocols.http import TokenCheck, handle_errors
from pykernels.serve.service import Service

__all__ = ["application"]


def application(service: Callable[[], Service], jobs: Callable[[], Jobs] | None = None) -> FastAPI:
    """The application.

    Args:
        service: who answers; asked at each request, so that it may be made on the engine's own event loop.
        jobs: who takes jobs, asked at each request; None where there are none.
    """
    app = FastAPI(title="pykernels", docs_url=None, redoc_url=None, openapi_url=None)
    if jobs is not None:
        app.include_router(job_routes.router(service, jobs))
    for protocol in (metrics, sagemaker, tensorflow, http_v2):
        app.include_router(protocol.router(service))
    handle_errors(app)
    app.add_middleware(TokenCheck, service=service)
    return app

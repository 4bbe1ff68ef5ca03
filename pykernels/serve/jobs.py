"""Long work: jobs that are submitted now and computed when there is time. Ray Serve's task consumers take them (Celery,
with Redis as the broker and as the store of results) and hand them to the replicas, where they join the batches.

What lies in Redis is JSON alone: Celery is told to accept nothing else, so nothing that it holds is ever executed.
"""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from pykernels.serve.environment import JOBS, NAME
from pykernels.serve.errors import NotFound, Overloaded, Unavailable
from pykernels.serve.service import Options

__all__ = ["Answer", "Jobs", "at_once", "bind", "build"]

T = TypeVar("T")
Answer = tuple[int, dict[str, str], bytes]  # status, headers and body, as of an inference over HTTP
KEPT = 24 * 3600  # seconds that a job and its result are there
LOST = 300  # seconds after which a job whose consumer died is taken by another
RETRIES = 10  # of a job whose replica died or refused it, at 1, 2, 4 ... 60 seconds
PATIENCE = 5.0  # seconds for an answer of Redis
STATUS = {"PENDING": "queued", "RETRY": "queued", "RECEIVED": "queued", "STARTED": "running", "SUCCESS": "done"}


def at_once(options: Options, replicas: int) -> int:
    """How many jobs are handed to the replicas at a time: as many as fill their batches, each a thread that waits."""
    return min(64, replicas * options.instances * options.batch)


def _key(job: str) -> str:
    return f"{JOBS}:{job}"


def _redis(url: str) -> Any:
    import redis

    return redis.Redis.from_url(url, socket_timeout=PATIENCE, socket_connect_timeout=PATIENCE)


def _config(url: str) -> Any:
    from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig

    only = {
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
    }
    custom = {
        **only,
        "result_expires": KEPT,
        "task_track_started": True,
        "worker_hijack_root_logger": False,
        "worker_prefetch_multiplier": 1,  # what waits, waits in Redis
    }
    return TaskProcessorConfig(
        queue_name=JOBS,
        adapter_config=CeleryAdapterConfig(
            broker_url=url,
            backend_url=url,
            app_custom_config=custom,
            broker_transport_options={"visibility_timeout": LOST},
        ),
        max_retries=RETRIES,
    )


class Jobs:
    """Submits jobs, and tells what became of them.

    Args:
        url: of Redis.
        waiting: how many jobs may wait; more are refused.
    """

    def __init__(self, url: str, waiting: int) -> None:
        from ray.serve.task_consumer import instantiate_adapter_from_config

        self._store = _redis(url)
        self._consumers = instantiate_adapter_from_config(_config(url))
        self._waiting = waiting

    async def submit(self, model: str, version: str, header: str | None, body: bytes) -> str:
        """Let an inference be computed later.

        Args:
            model, version: which network; version "" is the highest there is when the job's turn comes.
            header, body: of the request, as the Open Inference Protocol has them over HTTP.

        Returns:
            What the job is called.

        Raises:
            Overloaded: too many wait.
            Unavailable: Redis does not answer.
        """
        job = uuid.uuid4().hex
        given = {"job": job, "model": model, "version": version, "header": header}

        def enqueue() -> None:
            if self._store.llen(JOBS) >= self._waiting:
                raise Overloaded(f"{self._waiting} jobs wait already", retry_after=10)
            self._store.set(_key(job), model, ex=KEPT)
            try:
                text = base64.b64encode(body).decode()
                self._consumers.enqueue_task_sync("infer", kwargs={**given, "body": text}, task_id=job)
            except BaseException:
                self._store.delete(_key(job))
                raise

        await self._asked(enqueue)
        return job

    async def status(self, job: str) -> str:
        """``queued``, ``running``, ``done``, or ``failed`` where it was tried in vain.

        Raises:
            NotFound: there is no such job, or there was one too long ago.
            Unavailable: Redis does not answer.
        """
        return (await self._asked(lambda: self._find(job)))[0]

    async def result(self, job: str) -> tuple[str, Answer | None]:
        """The status, and the answer of a job that is done: what the inference itself would have answered.

        Raises:
            NotFound, Unavailable: as `status`.
        """
        status, found = await self._asked(lambda: self._find(job))
        if status != "done":
            return status, None
        return status, (int(found["status"]), dict(found["headers"]), base64.b64decode(found["body"]))

    async def drop(self, job: str) -> None:
        """Forget a job: one that waits is not computed any more.

        Raises:
            NotFound, Unavailable: as `status`.
        """

        def forget() -> None:
            self._find(job)
            self._store.delete(_key(job), f"celery-task-meta-{job}")

        await self._asked(forget)

    def _find(self, job: str) -> tuple[str, Any]:
        if not (job.isascii() and job.isalnum() and len(job) == 32 and self._store.exists(_key(job))):
            raise NotFound(f"job {job!r:.80} is unknown")
        found = self._consumers.get_task_status_sync(job)
        if found.status == "SUCCESS" and found.result is None:  # Ray reads the result before the status
            found = self._consumers.get_task_status_sync(job)
        return STATUS.get(found.status, "failed"), found.result

    async def _asked(self, work: Callable[[], T]) -> T:
        import kombu.exceptions
        import redis

        try:
            return await asyncio.to_thread(work)
        except (redis.RedisError, kombu.exceptions.OperationalError) as error:
            raise Unavailable(f"jobs: Redis does not answer: {error!s:.200}", retry_after=5) from error


def bind(url: str, at_once: int) -> Any:
    """The application of consumers, for Ray Serve.

    Args:
        url: of Redis.
        at_once: how many jobs they hand to the replicas at a time.
    """
    from ray import serve
    from ray.serve.task_consumer import task_consumer, task_handler

    @task_consumer(task_processor_config=_config(url))
    class Consumer:
        def __init__(self) -> None:
            self.store = _redis(url)
            self.replicas = serve.get_app_handle(NAME)

        @task_handler(name="infer")
        def infer(self, job: str, model: str, version: str, header: str | None, body: str) -> dict[str, Any]:
            """An error of the client's is an answer, too; what is raised is tried again."""
            if not self.store.exists(_key(job)):  # it was dropped
                return {"status": 404, "headers": {}, "body": ""}
            call = self.replicas.job.remote(model, version, header, base64.b64decode(body))
            status, headers, content = call.result()
            return {"status": status, "headers": headers, "body": base64.b64encode(content).decode()}

    apart = {"env_vars": {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}}  # Celery's threads have no event loop
    deployment = serve.deployment(
        Consumer,
        name=JOBS,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "runtime_env": apart},
        max_ongoing_requests=at_once,
    )
    return deployment.bind()


def build(arguments: dict[str, Any]) -> Any:
    """What ``import_path: pykernels.serve.jobs:build`` of a Serve config names.

    Args:
        arguments: those of `bind`.
    """
    return bind(**arguments)

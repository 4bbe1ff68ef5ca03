"""Jobs: submitted, polled, fetched and dropped. The routes with a queue in memory; all of it on Ray with Redis."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deployed import Deployed, deploy, free_ports
from torch import nn

import pykernels as pk
from pykernels.serve.application import application
from pykernels.serve.errors import NotFound, Overloaded
from pykernels.serve.service import Options, Service

X = [[1.0, 2.0, 3.0, 4.0]]
REQUEST = {"inputs": [{"name": "input_1", "shape": [1, 4], "datatype": "FP32", "data": X}]}
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "line.pk"
    pk.optimize(nn.Linear(4, 3), (torch.randn(2, 4),)).save(path)
    return path


class Memory:
    """Two jobs may wait; a test says what becomes of them."""

    def __init__(self) -> None:
        self.taken: dict[str, tuple[Any, ...]] = {}
        self.found: dict[str, tuple[str, Any]] = {}

    async def submit(self, *given: Any) -> str:
        if len(self.taken) == 2:
            raise Overloaded("2 jobs wait already", retry_after=10)
        job = uuid.uuid4().hex
        self.taken[job], self.found[job] = given, ("queued", None)
        return job

    async def status(self, job: str) -> str:
        return (await self.result(job))[0]

    async def result(self, job: str) -> tuple[str, Any]:
        if job not in self.found:
            raise NotFound(f"job {job!r} is unknown")
        return self.found[job]

    async def drop(self, job: str) -> None:
        await self.status(job)
        del self.found[job]


class Application:
    """The routes on a loop of their own, without a socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop, service: Service) -> None:
        self.loop, self.memory = loop, Memory()
        self.app = application(lambda: service, lambda: self.memory)  # type: ignore[arg-type, return-value]

    def __call__(self, method: str, path: str, content: Any = None) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of an answer."""
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"" if content is None else json.dumps(content).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
        self.loop.run_until_complete(self.app(scope, receive, send))
        body = b"".join(message.get("body", b"") for message in sent[1:])
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers, json.loads(body) if body else None


@pytest.fixture
def ask_for(net: Path) -> Iterator[Application]:
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        service = Service(Options({"line": str(net)}, batch=2))
        loop.run_until_complete(service.start())
        yield Application(loop, service)
        loop.run_until_complete(service.close())


def test_a_job_is_submitted_polled_fetched_and_dropped(ask_for: Application) -> None:
    memory = ask_for.memory
    status, headers, content = ask_for("POST", "/v2/models/line/versions/1/jobs", REQUEST)
    job = content["id"]
    assert status == 202 and content["status"] == "queued" and headers["location"] == f"/v2/jobs/{job}"
    model, version, header, body = memory.taken[job]
    assert (model, version, header, json.loads(body)) == ("line", "1", None, REQUEST)
    assert ask_for("GET", f"/v2/jobs/{job}")[2] == {"id": job, "status": "queued"}
    status, _, content = ask_for("GET", f"/v2/jobs/{job}/result")
    assert status == 202 and content["status"] == "queued"
    memory.found[job] = "done", (400, {"content-type": "application/json"}, b'{"error": "x"}')
    status, _, content = ask_for("GET", f"/v2/jobs/{job}/result")
    assert status == 400 and content == {"error": "x"}
    memory.found[job] = "failed", None
    assert ask_for("GET", f"/v2/jobs/{job}/result")[0] == 500
    assert ask_for("DELETE", f"/v2/jobs/{job}")[0] == 204
    for method, path in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
        assert ask_for(method, f"/v2/jobs/{job}{path}")[0] == 404


def test_what_is_wrong_is_told_when_it_is_submitted(ask_for: Application) -> None:
    assert ask_for("POST", "/v2/models/nothing/jobs", REQUEST)[0] == 404
    wrong = {"inputs": [{**REQUEST["inputs"][0], "shape": [2, 2]}]}
    status, _, content = ask_for("POST", "/v2/models/line/jobs", wrong)
    assert status == 400 and "input 'input_1'" in content["error"]
    assert not ask_for.memory.taken
    for expected in (202, 202, 429):
        status, headers, _ = ask_for("POST", "/v2/models/line/jobs", REQUEST)
        assert status == expected
    assert headers["retry-after"] == "10"


@pytest.mark.parametrize("url", ["http://h:1/0", "redis://", "6379", "redis:///0"])
def test_an_address_that_is_not_one_of_redis_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="jobs: must be redis://"):
        Options({"line": "line.pk"}, jobs=url)


# ---- on Ray, with Redis ----


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    (port,) = free_ports(1)
    folder = str(tmp_path_factory.mktemp("redis"))
    process = subprocess.Popen(["redis-server", "--port", str(port), "--save", "", "--dir", folder])
    yield f"redis://127.0.0.1:{port}/0"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def deployed(net: Path, redis: str) -> Iterator[Deployed]:
    for needed in ("ray", "celery", "redis"):
        pytest.importorskip(needed, reason="the extra `serve` is not installed")
    with deploy(net, "--replicas", "1", "--jobs", redis) as found:
        yield found


def ask(deployed: Deployed, method: str, path: str, content: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(deployed.http, timeout=PATIENCE)
    connection.request(method, path, None if content is None else json.dumps(content))
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text else None


def fetch(deployed: Deployed, job: str) -> tuple[int, Any]:
    end = time.monotonic() + PATIENCE
    while (found := ask(deployed, "GET", f"/v2/jobs/{job}/result"))[0] == 202:
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_results_are_the_answers_of_inferences(deployed: Deployed, net: Path) -> None:
    jobs = [ask(deployed, "POST", "/v2/models/line/jobs", REQUEST)[1]["id"] for _ in range(20)]
    expected = ask(deployed, "POST", "/v2/models/line/infer", REQUEST)
    assert expected[0] == 200
    y = torch.tensor(expected[1]["outputs"][0]["data"])
    assert torch.equal(y, pk.load(net)(torch.tensor(X)).flatten())
    for job in jobs:
        assert fetch(deployed, job) == expected
        assert ask(deployed, "GET", f"/v2/jobs/{job}")[1]["status"] == "done"
    late = ask(deployed, "POST", "/v2/models/line/jobs", {**REQUEST, "outputs": [{"name": "no"}]})[1]["id"]
    assert fetch(deployed, late)[0] == 400
    assert ask(deployed, "DELETE", f"/v2/jobs/{late}")[0] == 204
    assert ask(deployed, "GET", f"/v2/jobs/{late}")[0] == 404


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_jobs_outlive_the_replica_that_computes_them(deployed: Deployed) -> None:
    (replica,) = deployed.replicas()
    jobs = [ask(deployed, "POST", "/v2/models/line/jobs", REQUEST)[1]["id"] for _ in range(8)]
    os.kill(replica, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while ask_ready(deployed) != 200:
        assert time.monotonic() < end
        time.sleep(0.5)
    assert [fetch(deployed, job)[0] for job in jobs] == [200] * 8


def ask_ready(deployed: Deployed) -> int:
    try:
        return ask(deployed, "GET", "/v2/health/ready")[0]
    except OSError:
        return 0

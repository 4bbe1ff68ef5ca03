"""What a cluster is told: every file against the schema of whoever reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
import yaml
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pykernels.serve import manifests
from pykernels.serve.environment import ENVIRONMENT
from pykernels.serve.service import Options

CRD = os.environ.get("PYKERNELS_KUBERAY_CRD")  # KubeRay's ray.io_rayservices.yaml, compressed by gzip or not


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options({"resnet": "/srv/resnet.pk"}, threads=2, batch=8, p99_ms=50.0, token_file="/etc/token")


@pytest.fixture
def written(tmp_path: Path, options: Options) -> Path:
    found = manifests.write(tmp_path / "deploy", options, 3, 8000, 8001)
    names = ["Dockerfile", "grpc-client.json", "nginx.conf", "rayservice.yaml", "serve.yaml"]
    assert sorted(path.name for path in found) == names
    return tmp_path / "deploy"


def test_the_serve_config_gives_the_options_back(written: Path, options: Options) -> None:
    content = yaml.safe_load((written / "serve.yaml").read_text())
    (application,) = content["applications"]
    arguments = application["args"]
    assert arguments.pop("replicas") == 3
    assert Options(**arguments) == options


def test_jobs_are_an_application_of_their_own(options: Options) -> None:
    jobs = dataclasses.replace(options, jobs="redis://redis:6379/0")
    _, consumers = manifests.serve_config(jobs, 3, 8000, 8001)["applications"]
    assert consumers["route_prefix"] is None
    assert consumers["args"] == {"url": "redis://redis:6379/0", "at_once": 24}


def test_the_serve_config_is_what_ray_takes(written: Path, options: Options) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed")
    jobs = dataclasses.replace(options, jobs="redis://redis:6379/0")
    schema.ServeDeploySchema.model_validate(manifests.serve_config(jobs, 3, 8000, 8001))
    gpus = dataclasses.replace(options, device="cuda", gpus=0.5)
    schema.ServeDeploySchema.model_validate(manifests.serve_config(gpus, 3, 8000, 8001))
    schema.ServeDeploySchema.model_validate(yaml.safe_load((written / "serve.yaml").read_text()))
    service = yaml.safe_load((written / "rayservice.yaml").read_text())
    schema.ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))


@pytest.mark.skipif(CRD is None, reason="PYKERNELS_KUBERAY_CRD names no definition of KubeRay's")
def test_the_ray_service_is_what_kuberay_takes(written: Path, options: Options) -> None:
    assert CRD is not None
    held = Path(CRD).read_bytes()
    definition = yaml.load(
        gzip.decompress(held) if CRD.endswith(".gz") else held, getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1")
    service = yaml.safe_load((written / "rayservice.yaml").read_text())
    strict = _closed(schema)
    jsonschema.validate(service, strict)
    jsonschema.validate(manifests.ray_service(dataclasses.replace(options, device="cuda"), 3, 8000, 8001), strict)
    service["spec"]["rayClusterConfig"]["headGroupSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(service, strict)


def _closed(schema: Any) -> Any:
    """The schema, which refuses fields that it does not name, as Kubernetes prunes them."""
    if isinstance(schema, dict):
        closed = {key: _closed(value) for key, value in schema.items()}
        if "properties" in closed and isinstance(closed["properties"], dict) and "type" in closed:
            loose = closed.get("x-kubernetes-preserve-unknown-fields") or closed["properties"] == {}
            closed.setdefault("additionalProperties", bool(loose))
        if closed.get("x-kubernetes-int-or-string"):
            closed.pop("type", None)
        return closed
    return [_closed(item) for item in schema] if isinstance(schema, list) else schema


def test_containers_have_ray_told_before_it_starts_and_see_models_and_token_read_only(written: Path) -> None:
    service = yaml.safe_load((written / "rayservice.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    for pod in (cluster["headGroupSpec"]["template"], workers["template"]):
        (container,) = pod["spec"]["containers"]
        assert {e["name"]: e["value"] for e in container["env"]} == ENVIRONMENT
        assert all(mount["readOnly"] for mount in container["volumeMounts"])
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["args"]["models"] == {"resnet": "/models/resnet/1/net.pk"}
    assert application["args"]["token_file"] == "/etc/pykernels/token"
    assert workers["replicas"] == 3 and container["resources"]["limits"]["cpu"] == "2"


def test_nginx_takes_the_configuration(written: Path) -> None:
    nginx = shutil.which("nginx")
    openssl = shutil.which("openssl")
    if nginx is None or openssl is None:
        pytest.skip("nginx or openssl is not installed")
    (written / "certs").mkdir()
    subprocess.run(
        f"{openssl} req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.crt".split(),
        cwd=written / "certs",
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [nginx, "-t", "-p", written, "-c", written / "nginx.conf"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "test is successful" in done.stderr, done.stderr


def test_nginx_sends_no_refusal_and_no_change_of_the_repository_twice(options: Options) -> None:
    text = manifests.nginx(options, ["10.0.0.1", "10.0.0.2"], 8000, 8001)
    retried = [line.split() for line in text.splitlines() if "_next_upstream " in line and "off" not in line]
    assert [line[0] for line in retried] == ["proxy_next_upstream", "grpc_next_upstream"]
    assert {"error", "timeout", "http_502", "non_idempotent;"} <= set(retried[0])
    assert "grpc_set_header application pykernels;" in text
    assert retried[1][1:] == ["error", "timeout;"]  # of what was not sent yet: nginx keeps nothing of a stream
    assert all("http_429" not in line and "http_503;" not in line and "http_503" not in line for line in retried)
    assert "least_conn" in text and "server 10.0.0.2:8001" in text
    assert "location /inference.GRPCInferenceService/ { grpc_pass grpc://grpc_nodes; }" in text
    assert "RepositoryModel { grpc_pass grpc://grpc_nodes; grpc_next_upstream off; }" in text
    assert "location /v2/repository/ { proxy_pass http://http_nodes; proxy_next_upstream off; }" in text


@pytest.mark.parametrize(
    "code, tries", [("UNAVAILABLE", 3), ("NOT_FOUND", 3), ("RESOURCE_EXHAUSTED", 1), ("INVALID_ARGUMENT", 1)]
)
def test_clients_of_grpc_send_again_what_was_lost_and_nothing_that_was_answered(
    written: Path, code: str, tries: int
) -> None:
    """Of 600 KB, by a server that answers the third time."""
    asked: list[int] = []

    class Twice(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
            asked.append(len(request.raw_input_contents[0]))
            if len(asked) < 3:
                context.abort(grpc.StatusCode[code], "not now")
            return service_pb2.ModelInferResponse(model_name=request.model_name)

    server = grpc.server(ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Twice(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    again = (written / "grpc-client.json").read_text()
    options = [("grpc.service_config", again), ("grpc.per_rpc_retry_buffer_size", 1 << 26)]
    request = service_pb2.ModelInferRequest(model_name="net", raw_input_contents=[bytes(600_000)])
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            with contextlib.nullcontext() if tries == 3 else pytest.raises(grpc.RpcError):
                infer(request, timeout=30)
    finally:
        server.stop(None)
    assert asked == [600_000] * tries

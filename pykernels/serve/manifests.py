"""What a cluster is told: a Serve config, a RayService of KubeRay, nginx in front, an image; and what clients are told
that speak gRPC."""

from __future__ import annotations

import dataclasses
import json
import math
import string
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pykernels.serve.environment import ENVIRONMENT, JOBS, NAME, STUBS
from pykernels.serve.files import FILE
from pykernels.serve.jobs import at_once
from pykernels.serve.service import Options, on_a_gpu

__all__ = ["GRPC_CLIENT", "nginx", "ray_service", "serve_config", "write"]

MODELS, TOKEN = "/models", "/etc/pykernels/token"  # in containers
IMAGE = "pykernels-serve:latest"

NGINX = """\
# In front of Ray Serve's nodes: TLS, and retries that lose no request when a replica or a node dies.
# nginx -t -c $$PWD/nginx.conf; certs/server.crt and certs/server.key are yours.
worker_processes auto;
pid nginx.pid;
error_log stderr warn;  # what it keeps stands beside this file
events { worker_connections 4096; }

http {
  access_log off;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  server_tokens off;
  client_max_body_size $request_bytes;
  client_body_buffer_size 1m;  # requests up to it never touch the disk

  upstream http_nodes {
    least_conn;
    keepalive 64;
$http_servers
  }
  upstream grpc_nodes {
    least_conn;
    keepalive 64;
$grpc_servers
  }

  server {
    listen 8443 ssl http2;
    ssl_certificate certs/server.crt;
    ssl_certificate_key certs/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;

    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $$host;
    proxy_request_buffering on;  # a whole request can be sent again
    proxy_connect_timeout 1s;  # a node that is gone costs this, and takes few by least_conn; no node is given up,
    grpc_connect_timeout 1s;   # since a replica that dies makes its node's proxy refuse many requests at once
    proxy_read_timeout 60s;

    # An inference changes nothing, so it may be sent again, three times at most: two tries may meet a node that is
    # lost, one more another's proxy that still knows replicas there. 429 and 503 are answers: more requests make it
    # worse. 502 is a node's proxy whose replica died: each node is listed twice, so that it can choose another one; 404
    # may be one that came back and was not told of replicas yet. What has begun to flow over gRPC is not kept by nginx,
    # and so not sent again: clients do that, by grpc-client.json.
    proxy_next_upstream error timeout http_500 http_502 http_404 non_idempotent;
    proxy_next_upstream_tries 4;
    grpc_next_upstream error timeout;
    grpc_next_upstream_tries 4;
    grpc_set_header application $name;  # for a node without a replica, whose proxy must know where to send a request

    location / { proxy_pass http://http_nodes; }
    location /v2/repository/ { proxy_pass http://http_nodes; proxy_next_upstream off; }
    location /inference.GRPCInferenceService/ { grpc_pass grpc://grpc_nodes; }
    location /inference.GRPCInferenceService/RepositoryModel { grpc_pass grpc://grpc_nodes; grpc_next_upstream off; }
  }
}
"""

DOCKERFILE = """\
# Offline, from wheels that were fetched before: pip wheel --wheel-dir wheels 'pykernels[$extras]'
# docker build -t $image . && docker run$gpus -p 8000:8000 -p 8001:8001 -v $$PWD/models:$models:ro $image
FROM python:3.11-slim
COPY wheels /wheels
RUN pip install --no-index --find-links /wheels 'pykernels[$extras]' && useradd --uid 1000 --create-home ray
USER ray
WORKDIR /home/ray
ENV $environment
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
CMD ["pykernels", "serve", "$models", "--in-process", "--device", "$device", "--host", "0.0.0.0"]
"""


# gRPC's own retries, in its service config: of what had no answer, or one that says "not now". A node's proxy that
# came back and was not told of replicas yet says NOT_FOUND. RESOURCE_EXHAUSTED, the server's word for too much that
# waits, is an answer.
GRPC_CLIENT = {
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService", "method": "ModelInfer"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE", "NOT_FOUND"],
            },
        }
    ]
}


def serve_config(options: Options, replicas: int, port: int, grpc_port: int) -> dict[str, Any]:
    """What ``serve deploy`` takes.

    Args:
        options: what is served; paths are those of every node.
        replicas: how many, of `options.instances` instances each.
    """
    applications: list[dict[str, Any]] = [
        {
            "name": NAME,
            "route_prefix": "/",
            "import_path": "pykernels.serve.engine:build",
            "args": {**dataclasses.asdict(options), "replicas": replicas},
        }
    ]
    if options.jobs is not None:
        applications.append(
            {
                "name": JOBS,
                "route_prefix": None,
                "import_path": "pykernels.serve.jobs:build",
                "args": {"url": options.jobs, "at_once": at_once(options, replicas)},
            }
        )
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": port},
        "grpc_options": {"port": grpc_port, "grpc_servicer_functions": [STUBS]},
        "applications": applications,
    }


def ray_service(options: Options, replicas: int, port: int, grpc_port: int) -> dict[str, Any]:
    """A RayService for KubeRay: models on a volume claim ``pykernels-models``; the token, where there is one, in
    a secret ``pykernels-token``."""
    models: str | dict[str, str] = MODELS
    if not isinstance(options.models, str):
        models = {
            name: str(PurePosixPath(MODELS, name, "1", *([] if Path(place).is_dir() else [FILE])))
            for name, place in options.models.items()
        }
    token = None if options.token_file is None else TOKEN
    inside = dataclasses.replace(options, models=models, token_file=token)
    gpu = options.device != "cpu"
    together = on_a_gpu(options.gpus) if gpu else 1  # replicas in a pod, which has one GPU
    cores, pods = together * options.cores, math.ceil(replicas / together)
    volumes: list[dict[str, Any]] = [
        {"name": "models", "persistentVolumeClaim": {"claimName": "pykernels-models", "readOnly": True}}
    ]
    mounts: list[dict[str, Any]] = [{"name": "models", "mountPath": MODELS, "readOnly": True}]
    if token is not None:
        volumes.append({"name": "token", "secret": {"secretName": "pykernels-token"}})
        mounts.append({"name": "token", "mountPath": str(PurePosixPath(TOKEN).parent), "readOnly": True})

    def pod(name: str, cpus: int, serves: bool) -> dict[str, Any]:
        container: dict[str, Any] = {
            "name": name,
            "image": IMAGE,
            "env": [{"name": key, "value": value} for key, value in ENVIRONMENT.items()],
            "resources": {
                "requests": {"cpu": str(cpus), "memory": "2Gi"},
                "limits": {"cpu": str(cpus), "memory": "8Gi"},
            },
            "volumeMounts": mounts,
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        if serves:
            if gpu:
                for granted in container["resources"].values():
                    granted["nvidia.com/gpu"] = "1"
            container["ports"] = [
                {"containerPort": port, "name": "serve"},
                {"containerPort": grpc_port, "name": "grpc"},
            ]
            container["readinessProbe"] = {
                "httpGet": {"path": "/v2/health/ready", "port": port},
                "periodSeconds": 2,
                "timeoutSeconds": 2,
                "failureThreshold": 3,
            }
        return {
            "spec": {
                "containers": [container],
                "volumes": volumes,
                "terminationGracePeriodSeconds": 60,
                "securityContext": {"runAsNonRoot": True, "runAsUser": 1000},
            }
        }

    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME},
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve_config(inside, replicas, port, grpc_port), sort_keys=False),
            "rayClusterConfig": {
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": pod("ray-head", 2, serves=False),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "replicas",
                        "replicas": pods,
                        "minReplicas": 1,
                        "maxReplicas": 4 * pods,
                        "rayStartParams": {"num-cpus": str(cores), **({"num-gpus": "1"} if gpu else {})},
                        "template": pod("ray-worker", cores, serves=True),
                    }
                ],
            },
        },
    }


def nginx(options: Options, nodes: list[str], port: int, grpc_port: int) -> str:
    """A configuration of nginx in front of these nodes."""

    def servers(place: int) -> str:
        return "\n".join(f"    server {node}:{place} max_fails=0;" for node in 2 * nodes)

    return string.Template(NGINX).substitute(
        name=NAME, request_bytes=options.request_bytes, http_servers=servers(port), grpc_servers=servers(grpc_port)
    )


def write(folder: Path, options: Options, replicas: int, port: int, grpc_port: int) -> list[Path]:
    """Write all of it; the paths.

    Raises:
        OSError: a file cannot be written.
    """
    cpu = options.device == "cpu"
    image = {
        "image": IMAGE,
        "models": MODELS,
        "device": options.device,
        "extras": "serve" if cpu else "serve,gpu",
        "gpus": "" if cpu else " --gpus all",
        "environment": " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items()),
    }
    texts = {
        "serve.yaml": yaml.safe_dump(serve_config(options, replicas, port, grpc_port), sort_keys=False),
        "rayservice.yaml": yaml.safe_dump(ray_service(options, replicas, port, grpc_port), sort_keys=False),
        "nginx.conf": nginx(options, ["127.0.0.1"], port, grpc_port),
        "grpc-client.json": json.dumps(GRPC_CLIENT, indent=2) + "\n",
        "Dockerfile": string.Template(DOCKERFILE).substitute(image),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]

"""What Ray must be told before it starts, and what both the engine and its manifests call things."""

from __future__ import annotations

__all__ = ["ENVIRONMENT", "NAME", "STUBS"]

NAME = "pykernels"
STUBS = "tritonclient.grpc.service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
# On every node: replicas behind HAProxy, not behind a proxy in Python, and time for a busy machine to start it;
# replicas of the priority of other processes (Ray gives its workers a nice value of 15, and they starve beside
# anybody).
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_worker_niceness": "0",
}

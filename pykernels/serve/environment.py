"""What Ray must be told before it starts, and what both the engine and its manifests call things."""

from __future__ import annotations

__all__ = ["ENVIRONMENT", "JOBS", "NAME", "STUBS"]

NAME = "pykernels"
JOBS = "pykernels-jobs"  # the application of consumers, their queue, and what keys in Redis begin with
STUBS = "pykernels.serve.stubs.add_GRPCInferenceServiceServicer_to_server"
# On every node: replicas behind HAProxy, not a proxy in Python, and time for a busy machine to start it. A replica
# that goes stays 10 seconds for whoever was not told, not 30: after 30 SageMaker and Kubernetes kill. Ray gives its
# workers a nice value of 15, and they starve beside anybody.
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "10",
    "RAY_worker_niceness": "0",
}

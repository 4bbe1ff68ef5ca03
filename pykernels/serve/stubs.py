"""The gRPC form's stubs for Ray: its proxies, and what replicas must know to read what those pass on."""

from __future__ import annotations

import sys

from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

__all__ = ["add_GRPCInferenceServiceServicer_to_server"]

# A proxy whose node has no replica pickles the request for another node's. Pickle looks for a message's class where the
# message says that it is from, and tritonclient generates its messages under a name that nothing can import.
sys.modules.setdefault(service_pb2.ModelInferRequest.__module__, service_pb2)

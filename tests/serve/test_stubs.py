"""The stubs that Ray's proxies are given: requests of the gRPC form can be passed on from process to process."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest
from tritonclient.grpc import service_pb2

from pykernels.serve.environment import STUBS


def test_requests_are_pickled_where_the_stubs_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    request = service_pb2.ModelInferRequest(model_name="net", raw_input_contents=[b"\0\1\2\3"])
    monkeypatch.delitem(sys.modules, type(request).__module__, raising=False)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(request)
    module, _, name = STUBS.rpartition(".")
    stubs = importlib.reload(importlib.import_module(module))
    assert callable(getattr(stubs, name))
    assert pickle.loads(pickle.dumps(request)) == request

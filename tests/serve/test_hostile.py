"""Requests from strangers: damaged, huge, compressed a thousandfold, too many, given up, without the token."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from tritonclient import grpc as tritonclient
from tritonclient.utils import InferenceServerException

import pykernels as pk
from pykernels.serve.errors import Refused
from pykernels.serve.protocols import grpc_v2, http_v2
from tests.serve.serving import PATIENCE, Running, save, serving

pytestmark = pytest.mark.xdist_group("serve")
HEADER = "Inference-Header-Content-Length"
LIMIT = 1 << 20
GOOD = {"name": "input_1", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 32}}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models"), "line", nn.Linear(4, 3), torch.randn(2, 4))


@pytest.fixture(scope="module")
def service(net: Path) -> Iterator[Running]:
    with serving(models={"line": str(net)}, batch=4, request_bytes=LIMIT) as service:
        yield service


def post(service: Running, body: bytes, **headers: str) -> tuple[int, str]:
    status, _, answer = service.raw("POST", "/v2/models/line/infer", body, headers)
    return status, json.loads(answer).get("error", "") if answer else ""


def binary(tensor: dict[str, Any], data: bytes) -> tuple[bytes, dict[str, str]]:
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + data, {HEADER: str(len(head))}


@pytest.mark.parametrize(
    "change, data, message",
    [
        ({"shape": [2, -4]}, 32, "inputs.0.shape.1: Input should be greater than or equal to 0"),
        ({"shape": [-2, -4]}, 32, "inputs.0.shape.0"),
        ({"shape": [2.5, 4]}, 32, "inputs.0.shape.0: Input should be a valid integer"),
        ({"shape": [True, 4]}, 32, "inputs.0.shape.0: Input should be a valid integer"),
        ({"shape": "2,4"}, 32, "inputs.0.shape: Input should be a valid array"),
        ({"shape": [2**20, 2**30]}, 32, "needs 4503599627370496 bytes, 32 are given"),
        ({"shape": [2**39, 2**39]}, 32, "is too large"),
        ({"shape": [0, 2**39, 2**39]}, 32, "is too large"),
        ({"shape": [2**62, 4]}, 32, "input 'input_1': shape"),
        ({"shape": [10**40]}, 32, "input 'input_1': shape"),
        ({"shape": [1] * 100}, 32, "input 'input_1': shape"),
        ({"shape": [0, 2**39]}, 0, "binary_data_size 32 does not fit into 0 bytes"),
        ({"shape": [2, 4]}, 31, "input 'input_1': binary_data_size 32 does not fit into 31 bytes that are left"),
        ({"shape": [2, 4]}, 33, "1 bytes follow that belong to no input"),
        ({"shape": [3, 4]}, 32, r"input 'input_1' of shape [3, 4] and FP32 needs 48 bytes, 32 are given"),
        ({"parameters": {"binary_data_size": -32}}, 32, "binary_data_size -32 does not fit"),
        ({"parameters": {"binary_data_size": 2**70}}, 32, "does not fit"),
        ({"parameters": {"binary_data_size": "32"}}, 32, "binary_data_size '32' does not fit"),
        ({"parameters": {"binary_data_size": True}}, 32, "binary_data_size True does not fit"),
        ({"parameters": {}}, 32, "input 'input_1' has neither data nor binary_data_size"),
        ({"data": [0.0] * 8}, 32, "input 'input_1' has both data and binary_data_size"),
        ({"parameters": {"shared_memory_region": "x"}}, 32, "there is no shared memory with clients here"),
        ({"datatype": "FP31"}, 32, "input 'input_1': datatype 'FP31' is none of"),
        ({"datatype": 3}, 32, "inputs.0.datatype: Input should be a valid string"),
        ({"name": "x" * 100_000}, 32, "input 'xxx"),
    ],
)
def test_tensors_that_lie_about_themselves(service: Running, change: dict[str, Any], data: int, message: str) -> None:
    body, headers = binary({**GOOD, **change}, bytes(data))
    status, error = post(service, body, **headers)
    assert status in (400, 501) and message in error and len(error) < 1000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe{}",
        b'{"inputs": "\xc3\x28"}',
        b'{"inputs": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
        b'{"inputs": [{"name": "input_1", "shape": [1], "datatype": "FP32", "data": '
        + b"[" * 150
        + b"1"
        + b"]" * 150
        + b"}]}",
        b'{"id": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"inputs": []}',
        b'{"inputs": [{"name": "input_1", "shape": [2, 4], "datatype": "FP32", "data": {"a": 1}}]}',
        b'{"inputs": [{"name": "input_1", "shape": [1, 4], "datatype": "FP32", "data": [1, [2], 3, 4]}]}',
        b'{"inputs": [{"name": "input_1", "shape": [1, 4], "datatype": "FP32", "data": [1, "2", null, 4]}]}',
        b'{"inputs": [{"name": "input_1", "shape": [1, 4], "datatype": "FP32", "data": [' + b"9" * 5000 + b"]}]}",
    ],
)
def test_bodies_that_are_no_request(service: Running, body: bytes) -> None:
    status, error = post(service, body)
    assert status == 400 and error and len(error) < 1000
    assert service.json("POST", "/v1/models/line:predict", None)[0] == 400


@pytest.mark.parametrize("length", ["0", "-1", "1e3", "99999999", "x", "１", "9" * 30, ""])
def test_a_length_of_the_json_that_is_none(service: Running, length: str) -> None:
    body, _ = binary(GOOD, bytes(32))
    status, _, answer = service.raw("POST", "/v2/models/line/infer", body, {HEADER: length.encode().decode("latin-1")})
    assert status == 400 and HEADER in json.loads(answer)["error"]


def test_nan_and_infinity_are_numbers_like_others(service: Running, net: Path) -> None:
    x = torch.tensor([[float("nan"), 0, 0, 0], [float("inf"), 0, 0, 0]])
    body = json.dumps({"inputs": [{"name": "input_1", "shape": [2, 4], "datatype": "FP32", "data": x.tolist()}]})
    status, _, answer = service.raw("POST", "/v2/models/line/infer", body.encode())
    found = torch.tensor(json.loads(answer)["outputs"][0]["data"]).view(2, 3)
    assert status == 200 and torch.equal(found.isnan(), pk.load(net)(x).isnan())


def test_bombs_are_not_unpacked(service: Running) -> None:
    bomb = gzip.compress(bytes(40 * LIMIT), 9)
    assert len(bomb) < LIMIT
    begin = time.monotonic()
    status, error = post(service, bomb, **{"Content-Encoding": "gzip"})
    assert status == 413 and f"larger than {LIMIT} bytes" in error
    assert post(service, zlib.compress(bytes(40 * LIMIT), 9), **{"Content-Encoding": "deflate"})[0] == 413
    assert time.monotonic() - begin < 10
    assert service.service.budget.used == 0


@pytest.mark.parametrize(
    "body, coding, status",
    [
        (b"nothing", "gzip", 400),
        (gzip.compress(b"{}" * 100)[:-9], "gzip", 400),
        (gzip.compress(b"{}") + b"more", "gzip", 400),
        (gzip.compress(b"{}"), "deflate", 400),
        (b"{}", "br", 501),
        (b"{}", "gzip, gzip", 501),
    ],
    ids=["none", "truncated", "followed", "another", "unknown", "twice"],  # gzip's bytes hold the time
)
def test_damaged_and_unknown_compression(service: Running, body: bytes, coding: str, status: int) -> None:
    assert post(service, body, **{"Content-Encoding": coding})[0] == status


def test_more_bytes_than_a_request_may_have(service: Running) -> None:
    assert post(service, bytes(LIMIT + 1))[0] == 413

    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield bytes(LIMIT // 20)

    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read the rest
        status, _, _ = service.raw("POST", "/v2/models/line/infer", parts())  # type: ignore[arg-type]
        assert status == 413
    with socket.create_connection((service.addresses.host, service.addresses.http), PATIENCE) as connection:
        connection.sendall(b"POST /v2/models/line/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999\r\n\r\n")
        assert b" 413 " in connection.recv(1000).splitlines()[0]


def test_json_counts_for_the_memory_that_it_becomes(net: Path) -> None:
    with serving(models={"line": str(net)}, batch=4, request_bytes=LIMIT, memory_bytes=LIMIT) as small:
        numbers = ",".join(["1.5"] * (LIMIT // 16))
        tensor = f'{{"name": "input_1", "shape": [{LIMIT // 64}, 4], "datatype": "FP32", "data": [{numbers}]}}'
        status, error = post(small, f'{{"inputs": [{tensor}]}}'.encode())
        assert status == 413 and "send tensors as bytes" in error
        rows = {**GOOD, "shape": [LIMIT // 64, 4], "parameters": {"binary_data_size": LIMIT // 4}}
        body, headers = binary(rows, bytes(LIMIT // 4))
        status, error = post(small, body, **headers)
        assert status == 413 and f"{LIMIT // 64} rows are too many: at most 1024 are answered at once" in error
        body, headers = binary(GOOD, bytes(32))
        assert post(small, body, **headers)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/..%2f..%2fetc%2fpasswd",
        "/v2/models/../../../etc/passwd",
        "/v2/models/line/versions/..%2f1/infer",
        "/v2/models/line/versions/1%00",
        "/v2/models/%ff%fe",
        "/v2/models/" + "a" * 5000,
        "/v1/models/..%2fline:predict",
        "/v2/repository/models/..%2f..%2fx/load",
        "//etc/passwd",
        "/docs",
        "/openapi.json",
    ],
)
def test_paths_lead_nowhere(service: Running, path: str) -> None:
    for method in ("GET", "POST"):
        status, _, answer = service.raw(method, path, b"{}")
        assert status in (400, 403, 404, 405), answer
        assert "error" in json.loads(answer) and b"root:" not in answer


def test_models_are_not_loaded_or_unloaded_by_clients_unless_they_may(service: Running) -> None:
    for act in ("load", "unload"):
        status, error = service.json("POST", f"/v2/repository/models/line/{act}", {})
        assert status == 403 and "not loaded or unloaded by clients here" in error["error"]
    with tritonclient.InferenceServerClient(service.grpc) as client:
        with pytest.raises(InferenceServerException, match="not loaded or unloaded by clients here"):
            client.unload_model("line")
        assert client.is_model_ready("line")


def test_after_all_that_it_answers(service: Running, net: Path) -> None:
    x = torch.randn(2, 4)
    body, headers = binary(GOOD, x.numpy().tobytes())
    status, _, answer = service.raw("POST", "/v2/models/line/infer", body, headers)
    found = torch.tensor(json.loads(answer)["outputs"][0]["data"]).view(2, 3)
    assert status == 200 and torch.equal(found, pk.load(net)(x))
    assert service.service.budget.used == 0


# ---- the token ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(net: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text("s3cret\n")
    with serving(models={"line": str(net)}, batch=2, token_file=str(file)) as service:
        yield service


ROUTES = [
    ("GET", "/v2"),
    ("GET", "/v2/models/line"),
    ("GET", "/v2/models/line/ready"),
    ("GET", "/v2/models/stats"),
    ("POST", "/v2/models/line/infer"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v1/models/line:predict"),
    ("POST", "/invocations"),
    ("GET", "/metrics"),
    ("GET", "/nowhere"),
]


@pytest.mark.parametrize("method, path", ROUTES)
def test_nobody_gets_in_without_the_token(guarded: Running, method: str, path: str) -> None:
    for given_ in (None, "Bearer other", "Bearer s3cret2", "Bearer ", "s3cret", "Basic s3cret", "bearer \xff"):
        headers = {} if given_ is None else {"Authorization": given_}
        status, told, _ = guarded.raw(method, path, b"", headers)
        assert status == 401 and told["www-authenticate"] == "Bearer"
    assert guarded.raw(method, path, b"", {"Authorization": "Bearer s3cret"})[0] != 401


def test_health_needs_no_token(guarded: Running) -> None:
    assert [guarded.raw("GET", path)[0] for path in ("/v2/health/live", "/v2/health/ready", "/ping")] == [200] * 3
    with tritonclient.InferenceServerClient(guarded.grpc) as client:
        assert client.is_server_live() and client.is_server_ready()


def test_the_token_over_grpc(guarded: Running) -> None:
    with tritonclient.InferenceServerClient(guarded.grpc) as client:
        x = tritonclient.InferInput("input_1", [2, 4], "FP32")
        x.set_data_from_numpy(torch.randn(2, 4).numpy())
        calls: list[Callable[..., Any]] = [
            lambda **k: client.infer("line", [x], **k),
            lambda **k: client.get_model_metadata("line", **k),
            lambda **k: client.get_model_repository_index(**k),
            lambda **k: client.is_model_ready("line", **k),
        ]
        for call in calls:
            for headers in (None, {"authorization": "Bearer other"}):
                with pytest.raises(InferenceServerException, match="Authorization: Bearer"):
                    call(headers=headers)
            assert call(headers={"authorization": "Bearer s3cret"})


# ---- too many, and those who give up --------------------------------------------------------------------------------


class Gate:
    """Calls of a network wait until it is opened."""

    def __init__(self) -> None:
        self.opened, self.sizes = threading.Event(), []  # type: ignore[var-annotated]

    def wait(self, network: pk.Optimized) -> None:
        forward = network.forward

        def slow(*inputs: torch.Tensor) -> Any:
            self.sizes.append(inputs[0].shape[0])
            assert self.opened.wait(PATIENCE)
            return forward(*inputs)

        network.forward = slow  # type: ignore[method-assign]


@pytest.fixture
def slow(net: Path) -> Iterator[tuple[Running, Gate]]:
    gate = Gate()
    with serving(models={"line": str(net)}, batch=4, queue=3) as service:
        gate.wait(service.on_loop(service.service.repository.get("line")).network)
        try:
            yield service, gate
        finally:
            gate.opened.set()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_overload_is_refused_with_the_time_to_come_again(slow: tuple[Running, Gate]) -> None:
    service, gate = slow
    body, headers = binary(GOOD, bytes(32))
    with ThreadPoolExecutor(12) as clients:
        sent = [clients.submit(service.raw, "POST", "/v2/models/line/infer", body, headers) for _ in range(12)]
        until(lambda: sum(f.done() for f in sent) == 8)  # one is computed, three wait
        assert service.raw("GET", "/v2/health/ready")[0] == 200
        gate.opened.set()
        answers = [f.result(PATIENCE) for f in sent]
    assert sorted(status for status, _, _ in answers) == [200] * 4 + [429] * 8
    assert all(int(told["retry-after"]) >= 1 for status, told, _ in answers if status == 429)


def test_under_overload_nothing_of_a_request_is_read(slow: tuple[Running, Gate]) -> None:
    service, _ = slow
    queue = service.on_loop(service.service.repository.get("line")).queue
    most = 3 + 4  # may wait, may run at once
    where = (service.addresses.host, service.addresses.http)
    begin = b"POST /v2/models/line/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(most):  # who sends slowly
            connection = stack.enter_context(socket.create_connection(where))
            connection.sendall(begin)
        until(lambda: queue.coming == most)
        connection = stack.enter_context(socket.create_connection(where))
        connection.sendall(begin)
        connection.settimeout(PATIENCE)
        assert connection.recv(100).startswith(b"HTTP/1.1 429 ")
    until(lambda: queue.coming == 0)
    assert service.service.budget.used == 0 and queue.counts.refused == 1


def test_over_grpc_an_overload_says_so(slow: tuple[Running, Gate]) -> None:
    service, gate = slow
    x = tritonclient.InferInput("input_1", [2, 4], "FP32")
    x.set_data_from_numpy(torch.randn(2, 4).numpy())
    found: list[Any] = []
    with tritonclient.InferenceServerClient(service.grpc) as client:
        for _ in range(12):
            client.async_infer("line", [x], lambda result, error: found.append(error))
        until(lambda: len(found) == 8)
        assert all("requests wait already" in str(error) for error in found)
        assert all(error.status() == "StatusCode.RESOURCE_EXHAUSTED" for error in found)
        gate.opened.set()
        until(lambda: len(found) == 12)
        assert sum(error is None for error in found) == 4


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_who_hangs_up_leaves_the_batch(slow: tuple[Running, Gate], protocol: str) -> None:
    service, gate = slow
    body, headers = binary(GOOD, bytes(32))
    queue = service.on_loop(service.service.repository.get("line")).queue
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(service.raw, "POST", "/v2/models/line/infer", body, headers)
        until(lambda: len(gate.sizes) == 1)
        for _ in range(3):
            if protocol == "http":
                given_ = {"Host": "a", "Content-Length": len(body), **headers}
                head = "".join(f"{name}: {value}\r\n" for name, value in given_.items())
                with socket.create_connection((service.addresses.host, service.addresses.http)) as connection:
                    connection.sendall(f"POST /v2/models/line/infer HTTP/1.1\r\n{head}\r\n".encode() + body)
                    until(lambda: len(queue.waiting) == 1)
            else:
                with tritonclient.InferenceServerClient(service.grpc) as client:
                    x = tritonclient.InferInput("input_1", [2, 4], "FP32")
                    x.set_data_from_numpy(torch.zeros(2, 4).numpy())
                    call = client.async_infer("line", [x], lambda result, error: None)
                    until(lambda: len(queue.waiting) == 1)
                    call.cancel()
            until(lambda: not queue.waiting)
        second = clients.submit(service.raw, "POST", "/v2/models/line/infer", body, headers)
        until(lambda: len(queue.waiting) == 1)
        gate.opened.set()
        assert first.result(PATIENCE)[0] == second.result(PATIENCE)[0] == 200
    assert gate.sizes == [2, 2]
    assert queue.counts.cancelled == 3
    assert service.service.budget.used == 0


def test_a_stop_answers_what_was_taken(net: Path) -> None:
    gate = Gate()
    body, headers = binary(GOOD, bytes(32))
    with ThreadPoolExecutor(3) as clients:
        with serving(models={"line": str(net)}, batch=4) as service:
            gate.wait(service.on_loop(service.service.repository.get("line")).network)
            sent = [clients.submit(service.raw, "POST", "/v2/models/line/infer", body, headers) for _ in range(3)]
            queue = service.on_loop(service.service.repository.get("line")).queue
            until(lambda: len(gate.sizes) == 1 and len(queue.waiting) == 2)
            threading.Timer(0.3, gate.opened.set).start()
        assert [f.result(PATIENCE)[0] for f in sent] == [200] * 3


# ---- fuzz -----------------------------------------------------------------------------------------------------------


def refused_or_whole(read: Callable[[], Any]) -> None:
    """What is read is a call whose tensors lie inside of it, or it is refused; nothing else happens."""
    try:
        call = read()
    except Refused as refused:
        assert refused.status in (400, 501) and len(str(refused)) < 2000
    else:
        for x in call.inputs.values():
            assert isinstance(x, torch.Tensor)
            x.clone()


NUMBERS = st.one_of(st.integers(-3, 70), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "b"]) | st.text(max_size=5),
        "shape": st.lists(st.integers(0, 9), max_size=4) | st.lists(NUMBERS, max_size=4),
        "datatype": st.sampled_from(["FP32", "INT8", "BOOL", "BF16", "FP64", "BYTES", "fp32"]),
    },
    optional={
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "x", "classification"]), NUMBERS),
        "data": st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=5), max_leaves=20),
    },
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(TENSORS, max_size=3),
    st.binary(max_size=80),
    st.integers(-2, 2) | st.none(),
    st.dictionaries(st.sampled_from(["timeout", "binary_data_output", "priority"]), NUMBERS),
)
def test_fuzzed_bodies_are_read_or_refused(
    tensors: list[Any], data: bytes, shift: int | None, parameters: dict[str, Any]
) -> None:
    head = json.dumps({"inputs": tensors, "parameters": parameters}).encode()
    header = None if shift is None else str(len(head) + shift)
    refused_or_whole(lambda: http_v2.call_of(bytearray(head + data), header))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.text(max_size=4) | st.none())
def test_random_bytes_are_refused(data: bytes, header: str | None) -> None:
    refused_or_whole(lambda: http_v2.call_of(bytearray(data), header))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.sampled_from(["FP32", "INT8", "BOOL", "FP16", "INT64", "BYTES", ""]),
            st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=4),
        ),
        max_size=3,
    ),
    st.lists(st.binary(max_size=40), max_size=3),
    st.lists(st.floats(width=32), max_size=8),
)
def test_fuzzed_messages_are_read_or_refused(tensors: list[Any], raw: list[bytes], numbers: list[float]) -> None:
    request = grpc_v2.pb.ModelInferRequest(raw_input_contents=raw)
    for name, datatype, shape in tensors:
        added = request.inputs.add(name=name, datatype=datatype, shape=shape)
        if numbers and not raw:
            added.contents.fp32_contents.extend(numbers)
    refused_or_whole(lambda: grpc_v2.call_of(request))

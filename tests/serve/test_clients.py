"""Every call of NVIDIA's `tritonclient` that is offered, over HTTP and gRPC, waiting and asynchronous: the bits of the
loaded network; and errors that name what is wrong."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from ml_dtypes import bfloat16
from torch import nn
from tritonclient.utils import InferenceServerException

import pykernels as pk
from tests.networks import Mixed, lively
from tests.serve.serving import Running, Twins, save, serving

pytestmark = pytest.mark.xdist_group("serve")
KINDS = ("http", "http.aio", "grpc", "grpc.aio")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(folder, "mixed", lively(Mixed(), 3, 16, 16), torch.randn(2, 3, 16, 16))
    save(folder, "mixed", lively(Mixed(), 3, 16, 16), torch.randn(2, 3, 16, 16), version=2, precision="bf16")
    save(folder, "twins", Twins(), torch.randn(2, 4), torch.ones(2, 3, dtype=torch.int64))
    save(folder, "half", nn.Linear(4, 3).half(), torch.randn(2, 4).half())
    save(folder, "brain", nn.Linear(4, 3).bfloat16(), torch.randn(2, 4).bfloat16())
    save(folder, "fixed", nn.Linear(4, 3), torch.randn(2, 4), dynamic_batch=False)
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Running]:
    with serving(models=str(folder), batch=4, control=True, request_bytes=1 << 20) as service:
        yield service


class Client:
    """One of the four clients, each call of it waited for."""

    def __init__(self, kind: str, service: Running) -> None:
        self.module = {
            "http": tritonclient.http,
            "http.aio": tritonclient.http.aio,
            "grpc": tritonclient.grpc,
            "grpc.aio": tritonclient.grpc.aio,
        }[kind]
        self.kind, self.service = kind, service
        self.protocol = tritonclient.http if kind.startswith("http") else tritonclient.grpc
        self.place = service.http if kind.startswith("http") else service.grpc

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        async def waited() -> Any:
            client = self.module.InferenceServerClient(self.place)
            try:
                found = getattr(client, name)(*args, **kwargs)
                return await found if inspect.isawaitable(found) else found
            finally:
                closed = client.close()
                if inspect.isawaitable(closed):
                    await closed

        return asyncio.run(waited()) if self.kind.endswith("aio") else self._waiting(name, *args, **kwargs)

    def _waiting(self, name: str, *args: Any, **kwargs: Any) -> Any:
        client = self.module.InferenceServerClient(self.place)
        try:
            return getattr(client, name)(*args, **kwargs)
        finally:
            client.close()

    def input(self, name: str, datatype: str, x: numpy.ndarray, **options: Any) -> Any:
        found = self.protocol.InferInput(name, list(x.shape), datatype)
        found.set_data_from_numpy(x, **options)
        return found

    def told(self, found: Any) -> Any:
        """An answer as a dictionary, whichever the protocol."""
        if isinstance(found, (dict, list)):
            return found
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(found, preserving_proto_field_name=True)


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, service: Running) -> Client:
    return Client(request.param, service)


def same(found: numpy.ndarray, expected: torch.Tensor) -> bool:
    return numpy.array_equal(found, expected.numpy()) and found.dtype == expected.numpy().dtype


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_health(client: Client) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mixed")
    assert client.is_model_ready("mixed", "1")
    assert not client.is_model_ready("nothing")


def test_metadata(client: Client) -> None:
    assert client.told(client.get_server_metadata())["name"] == "pykernels"
    found = client.told(client.get_model_metadata("twins"))
    assert found["versions"] == ["1"] and found["platform"] == "pykernels"
    assert [(x["name"], x["datatype"], list(map(int, x["shape"]))) for x in found["inputs"]] == [
        ("image", "FP32", [-1, 4]),
        ("count", "INT64", [-1, 3]),
    ]
    assert [(y["name"], y["datatype"], list(map(int, y["shape"]))) for y in found["outputs"]] == [
        ("logits", "FP32", [-1, 3]),
        ("twice", "INT64", [-1, 3]),
    ]
    assert client.told(client.get_model_metadata("mixed"))["versions"] == ["1", "2"]


def test_configuration(client: Client) -> None:
    def config(name: str) -> Any:
        found = client.told(client.get_model_config(name))
        return found.get("config", found)

    batched, fixed = config("twins"), config("fixed")
    assert batched["max_batch_size"] == 4
    assert [int(size) for size in batched["input"][0]["dims"]] == [4]
    assert batched["input"][1]["data_type"] == "TYPE_INT64"
    assert fixed.get("max_batch_size", 0) == 0
    assert [int(size) for size in fixed["input"][0]["dims"]] == [2, 4]
    assert fixed["parameters"]["apart"]["string_value"] == "its batch size is not free"


def test_statistics_count_requests_and_rows(client: Client) -> None:
    def counted() -> tuple[int, int]:
        (found,) = client.told(client.get_inference_statistics("half"))["model_stats"]
        return int(found.get("inference_count", 0)), int(found["inference_stats"]["success"].get("count", 0))

    client.infer("half", [client.input("input_1", "FP16", numpy.ones((3, 4), numpy.float16))])
    rows, requests = counted()
    client.infer("half", [client.input("input_1", "FP16", numpy.ones((3, 4), numpy.float16))])
    assert counted() == (rows + 3, requests + 1)
    everything = client.told(client.get_inference_statistics())["model_stats"]
    assert {found["name"] for found in everything} >= {"mixed", "twins", "half"}


def test_the_repository_is_listed_loaded_and_unloaded(client: Client) -> None:
    def states() -> dict[tuple[str, str], str]:
        found = client.told(client.get_model_repository_index())
        return {(m["name"], m["version"]): m["state"] for m in (found if isinstance(found, list) else found["models"])}

    assert states()["fixed", "1"] == "READY"
    client.unload_model("fixed")
    assert states()["fixed", "1"] == "UNAVAILABLE"
    assert not client.is_model_ready("fixed")
    with pytest.raises(InferenceServerException, match="model 'fixed' is not loaded"):
        client.infer("fixed", [client.input("input_1", "FP32", numpy.ones((2, 4), numpy.float32))])
    client.load_model("fixed")
    assert states()["fixed", "1"] == "READY"
    with pytest.raises(InferenceServerException, match="models are loaded as they are in the folder"):
        client.load_model("fixed", config="{}")


# ---- inference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["", "1", "2"])
def test_answers_have_the_bits_of_the_loaded_network(client: Client, folder: Path, version: str) -> None:
    x = torch.randn(3, 3, 16, 16)
    found = client.infer("mixed", [client.input("x", "FP32", x.numpy())], model_version=version, request_id="7")
    assert same(found.as_numpy("output_0"), pk.load(folder / "mixed" / (version or "2") / "net.pk")(x))
    response = client.told(found.get_response())
    assert (response["model_version"], response["id"]) == (version or "2", "7")


def test_more_rows_than_a_batch_are_answered_in_one(client: Client, folder: Path) -> None:
    x = torch.randn(9, 3, 16, 16)
    found = client.infer("mixed", [client.input("x", "FP32", x.numpy())])
    assert same(found.as_numpy("output_0"), pk.load(folder / "mixed" / "2" / "net.pk")(x))


def test_several_inputs_and_chosen_outputs(client: Client, folder: Path) -> None:
    image, count = torch.randn(2, 4), torch.arange(6).view(2, 3)
    expected = pk.load(folder / "twins" / "1" / "net.pk")(image, count)
    inputs = [client.input("count", "INT64", count.numpy()), client.input("image", "FP32", image.numpy())]
    found = client.infer("twins", inputs)
    assert all(same(found.as_numpy(name), y) for name, y in expected.items())
    found = client.infer("twins", inputs, outputs=[client.protocol.InferRequestedOutput("twice")])
    assert same(found.as_numpy("twice"), expected["twice"]) and found.as_numpy("logits") is None


def test_half_precision(client: Client, folder: Path) -> None:
    x = torch.randn(2, 4).half()
    found = client.infer("half", [client.input("input_1", "FP16", x.numpy())])
    assert same(found.as_numpy("output_0"), pk.load(folder / "half" / "1" / "net.pk")(x))
    x = x.bfloat16()
    found = client.infer("brain", [client.input("input_1", "BF16", x.view(torch.int16).numpy().view(bfloat16))])
    expected = pk.load(folder / "brain" / "1" / "net.pk")(x)
    assert same(found.as_numpy("output_0").view(numpy.int16), expected.view(torch.int16))


def test_a_fixed_batch_size(client: Client, folder: Path) -> None:
    x = torch.randn(2, 4)
    found = client.infer("fixed", [client.input("input_1", "FP32", x.numpy())])
    assert same(found.as_numpy("output_0"), pk.load(folder / "fixed" / "1" / "net.pk")(x))


@pytest.mark.parametrize("request_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("kind", ["http", "http.aio"])
def test_compression_over_http(
    service: Running, folder: Path, kind: str, request_coding: str | None, response_coding: str | None
) -> None:
    client, x = Client(kind, service), torch.randn(2, 3, 16, 16)
    found = client.infer(
        "mixed",
        [client.input("x", "FP32", x.numpy())],
        request_compression_algorithm=request_coding,
        response_compression_algorithm=response_coding,
    )
    assert same(found.as_numpy("output_0"), pk.load(folder / "mixed" / "2" / "net.pk")(x))


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("kind", ["grpc", "grpc.aio"])
def test_compression_over_grpc(service: Running, folder: Path, kind: str, coding: str) -> None:
    client, x = Client(kind, service), torch.randn(2, 3, 16, 16)
    found = client.infer("mixed", [client.input("x", "FP32", x.numpy())], compression_algorithm=coding)
    assert same(found.as_numpy("output_0"), pk.load(folder / "mixed" / "2" / "net.pk")(x))


@pytest.mark.parametrize("kind", ["http", "http.aio"])
@pytest.mark.parametrize("binary", [False, True])
def test_tensors_as_json(service: Running, folder: Path, kind: str, binary: bool) -> None:
    client, image, count = Client(kind, service), torch.randn(2, 4), torch.arange(6).view(2, 3)
    expected = pk.load(folder / "twins" / "1" / "net.pk")(image, count)
    inputs = [
        client.input("image", "FP32", image.numpy(), binary_data=False),
        client.input("count", "INT64", count.numpy(), binary_data=binary),
    ]
    outputs = [client.protocol.InferRequestedOutput(name, binary_data=binary) for name in expected]
    found = client.infer("twins", inputs, outputs=outputs)
    assert all(same(found.as_numpy(name), y) for name, y in expected.items())


@pytest.mark.parametrize("kind", ["grpc", "grpc.aio"])
def test_a_stream_goes_on_after_an_error(service: Running, folder: Path, kind: str) -> None:
    client, x = Client(kind, service), torch.randn(2, 3, 16, 16)
    good = [client.input("x", "FP32", x.numpy())]
    requests = [("mixed", good, "a"), ("nothing", good, "b"), ("mixed", good, "c")]
    if kind == "grpc.aio":

        async def streamed() -> list[Any]:
            async def sent() -> Any:
                for name, inputs, number in requests:
                    yield {"model_name": name, "inputs": inputs, "request_id": number}

            async with tritonclient.grpc.aio.InferenceServerClient(service.grpc) as stub:
                return [pair async for pair in stub.stream_infer(sent())]

        found = asyncio.run(streamed())
    else:
        import queue

        answers: queue.Queue[Any] = queue.Queue()
        with tritonclient.grpc.InferenceServerClient(service.grpc) as stub:
            stub.start_stream(lambda result, error: answers.put((result, error)))
            for name, inputs, number in requests:
                stub.async_stream_infer(name, inputs, request_id=number)
            found = [answers.get(timeout=30) for _ in requests]
            stub.stop_stream()
    expected = pk.load(folder / "mixed" / "2" / "net.pk")(x)
    assert same(found[0][0].as_numpy("output_0"), expected) and same(found[2][0].as_numpy("output_0"), expected)
    assert "model 'nothing' is unknown" in str(found[1][1])


# ---- what is refused ------------------------------------------------------------------------------------------------


def wrong(client: Client, change: str) -> tuple[str, list[Any], dict[str, Any]]:
    """A request that is wrong in one way."""
    image, count = numpy.ones((2, 4), numpy.float32), numpy.ones((2, 3), numpy.int64)
    i, c = client.input("image", "FP32", image), client.input("count", "INT64", count)
    return {
        "model": ("nothing", [i, c], {}),
        "version": ("twins", [i, c], {"model_version": "9"}),
        "no version": ("twins", [i, c], {"model_version": "one"}),
        "missing": ("twins", [i], {}),
        "unknown": ("twins", [i, c, client.input("more", "FP32", image)], {}),
        "twice": ("twins", [i, i, c], {}),
        "dtype": ("twins", [client.input("image", "FP64", image.astype(numpy.float64)), c], {}),
        "shape": ("twins", [client.input("image", "FP32", numpy.ones((2, 5), numpy.float32)), c], {}),
        "dimensions": ("twins", [client.input("image", "FP32", numpy.ones(4, numpy.float32)), c], {}),
        "empty": ("twins", [client.input("image", "FP32", numpy.ones((0, 4), numpy.float32)), c], {}),
        "rows": ("twins", [client.input("image", "FP32", numpy.ones((3, 4), numpy.float32)), c], {}),
        "bytes": ("twins", [i, client.input("count", "BYTES", numpy.array([b"a"], numpy.object_))], {}),
        "output": ("twins", [i, c], {"outputs": [client.protocol.InferRequestedOutput("else")]}),
        "classes": ("twins", [i, c], {"outputs": [client.protocol.InferRequestedOutput("logits", class_count=2)]}),
        "sequence": ("twins", [i, c], {"sequence_id": 3}),
        "priority": ("twins", [i, c], {"priority": 3}),
        "large": ("twins", [client.input("image", "FP32", numpy.ones((1 << 17, 4), numpy.float32)), c], {}),
    }[change]


@pytest.mark.parametrize(
    "change, message",
    [
        ("model", "model 'nothing' is unknown"),
        ("version", "model 'twins' has no version 9; it has 1"),
        ("no version", "version 'one' is no whole number above 0"),
        ("missing", "input 'count' is missing; the inputs are image, count"),
        ("unknown", "input 'more' is unknown; the inputs are image, count"),
        ("twice", "input 'image' is there twice"),
        ("dtype", "input 'image' must be FP32, not FP64"),
        ("shape", r"input 'image' must have shape \[-1, 4\], -1 for any size of at least 1, not \[2, 5\]"),
        ("dimensions", r"input 'image' must have shape \[-1, 4\], .* not \[4\]"),
        ("empty", r"input 'image' must have shape \[-1, 4\], .* not \[0, 4\]"),
        ("rows", "input 'count' has 2 rows, but 'image' has 3"),
        ("bytes", "input 'count': datatype 'BYTES' is none of BOOL, UINT8"),
        ("output", "output 'else' is unknown; the outputs are logits, twice"),
        ("classes", "parameter 'classification': outputs are not classified here"),
        ("sequence", "parameter 'sequence_id': networks keep nothing between requests here"),
        ("priority", "parameter 'priority': all requests are equal here"),
        ("large", "larger than"),
    ],
)
def test_bad_input_is_told_by_name(client: Client, change: str, message: str) -> None:
    name, inputs, options = wrong(client, change)
    with pytest.raises(InferenceServerException, match=message):
        client.infer(name, inputs, **options)


def test_what_is_not_offered_says_so(client: Client) -> None:
    for call in ("get_trace_settings", "get_log_settings", "get_system_shared_memory_status"):
        with pytest.raises(InferenceServerException, match=r"not offered|not implemented"):
            getattr(client, call)()


def test_a_timeout_of_the_client_is_kept(client: Client, service: Running) -> None:
    inputs = [client.input("input_1", "FP32", numpy.ones((2, 4), numpy.float32))]
    client.infer("fixed", inputs, timeout=10_000_000)  # microseconds
    with pytest.raises(InferenceServerException, match=r"time was over|wait already"):
        service.loop.call_soon_threadsafe(setattr, service.service.runner, "free", 0)  # all instances are busy
        try:
            client.infer("fixed", inputs, timeout=50_000)
        finally:
            service.loop.call_soon_threadsafe(setattr, service.service.runner, "free", 1)

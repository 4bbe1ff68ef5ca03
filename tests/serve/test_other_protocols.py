"""TensorFlow Serving's REST form, SageMaker's routes and Prometheus's metrics, as curl asks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import pykernels as pk
from tests.serve.serving import Running, Twins, save, serving

pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(folder, "line", nn.Linear(4, 3), torch.randn(2, 4))
    save(folder, "line", nn.Linear(4, 3), torch.randn(2, 4), version=3)
    save(folder, "twins", Twins(), torch.randn(2, 4), torch.ones(2, 3, dtype=torch.int64))
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Running]:
    with serving(models=str(folder), batch=4) as service:
        yield service


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Running]:
    with serving(models={"line": str(folder / "line" / "1" / "net.pk")}, batch=4) as service:
        yield service


def network(folder: Path, name: str, version: int = 1) -> pk.Optimized:
    return pk.load(folder / name / str(version) / "net.pk")


def same(found: Any, expected: torch.Tensor) -> bool:
    """JSON holds every float32 exactly."""
    return torch.equal(torch.tensor(found, dtype=expected.dtype), expected)


# ---- TensorFlow Serving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, version", [("line", 3), ("line/versions/1", 1)])
def test_rows_of_the_only_input(service: Running, folder: Path, path: str, version: int) -> None:
    x = torch.randn(3, 4)
    expected = network(folder, "line", version)(x)
    status, found = service.json("POST", f"/v1/models/{path}:predict", {"instances": x.tolist()})
    assert status == 200 and same(found["predictions"], expected)
    status, found = service.json(
        "POST", f"/v1/models/{path}:predict", {"instances": [{"input_1": r} for r in x.tolist()]}
    )
    assert status == 200 and same(found["predictions"], expected)


def test_rows_of_several_inputs_and_outputs(service: Running, folder: Path) -> None:
    image, count = torch.randn(3, 4), torch.arange(9).view(3, 3)
    expected = network(folder, "twins")(image, count)
    rows = [{"image": i, "count": c} for i, c in zip(image.tolist(), count.tolist(), strict=True)]
    status, found = service.json("POST", "/v1/models/twins:predict", {"instances": rows})
    assert status == 200
    for name, y in expected.items():
        assert same([row[name] for row in found["predictions"]], y)


def test_columns(service: Running, folder: Path) -> None:
    image, count = torch.randn(3, 4), torch.arange(9).view(3, 3)
    columns = {"image": image.tolist(), "count": count.tolist()}
    status, found = service.json("POST", "/v1/models/twins:predict", {"inputs": columns})
    assert status == 200
    assert all(same(found["outputs"][name], y) for name, y in network(folder, "twins")(image, count).items())
    status, found = service.json("POST", "/v1/models/line:predict", {"inputs": image.tolist()})
    assert status == 200 and same(found["outputs"], network(folder, "line", 3)(image))


def test_states_of_versions(service: Running) -> None:
    assert service.json("GET", "/v1/models/line/versions/3") == (
        200,
        {
            "model_version_status": [
                {"version": "3", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
            ]
        },
    )
    status, found = service.json("GET", "/v1/models/line")
    assert status == 200 and [v["version"] for v in found["model_version_status"]] == ["1", "3"]


@pytest.mark.parametrize(
    "name, content, status, message",
    [
        ("nothing", {"instances": [[1, 2, 3, 4]]}, 404, "model 'nothing' is unknown"),
        ("line", {}, 400, "either 'instances' or 'inputs' is needed"),
        ("line", {"instances": [[1]], "inputs": [[1]]}, 400, "either 'instances' or 'inputs' is needed"),
        ("line", {"instances": []}, 400, "'instances' is empty"),
        ("line", {"instances": 3}, 400, "request: instances: Input should be a valid array"),
        ("line", {"instances": [[1, 2, 3]]}, 400, "input 'input_1' must have shape [-1, 4], -1"),
        ("line", {"instances": [[1, 2, 3, 4], [1]]}, 400, "input 'input_1': its lists differ in length"),
        ("line", {"instances": [["a", "b", "c", "d"]]}, 400, "input 'input_1' of FP32 must be lists of numbers"),
        ("line", {"instances": [{"b64": "AAAA"}]}, 400, "input 'b64' is unknown; the inputs are input_1"),
        ("line", {"inputs": [[1e300, 0, 0, 0]]}, 400, "input 'input_1' holds numbers that FP32 does not"),
        ("twins", {"instances": [[1, 2, 3, 4]]}, 400, "inputs by name are needed: image, count"),
        ("twins", {"instances": [{"image": [0] * 4}]}, 400, "input 'count' is missing"),
        ("twins", {"instances": [{"image": [0] * 4}, {"count": [0] * 3}]}, 400, "name different inputs"),
        (
            "twins",
            {"inputs": {"image": [[0] * 4], "count": [[0.5] * 3]}},
            400,
            "'count' of INT64 must be lists of whole",
        ),
        (
            "twins",
            {"inputs": {"image": [[0] * 4], "count": [[2**63] * 3]}},
            400,
            "'count' holds numbers that INT64 does not",
        ),
        ("line", {"inputs": [[0] * 4], "signature_name": "other"}, 400, "signature_name 'other' is unknown"),
    ],
)
def test_bad_predictions_are_told_by_name(service: Running, name: str, content: Any, status: int, message: str) -> None:
    found, told = service.json("POST", f"/v1/models/{name}:predict", content)
    assert found == status and message in told["error"]


# ---- SageMaker ------------------------------------------------------------------------------------------------------


def test_ping(service: Running) -> None:
    assert service.raw("GET", "/ping")[0] == 200


def test_invocations_in_both_forms_of_json(alone: Running, folder: Path) -> None:
    x = torch.randn(2, 4)
    expected = network(folder, "line")(x)
    status, found = alone.json("POST", "/invocations", {"instances": x.tolist()})
    assert status == 200 and same(found["predictions"], expected)
    status, found = alone.json("POST", "/invocations", {"inputs": x.tolist()})
    assert status == 200 and same(found["outputs"], expected)
    tensor = {"name": "input_1", "shape": [2, 4], "datatype": "FP32", "data": x.tolist()}
    status, found = alone.json("POST", "/invocations", {"inputs": [tensor]})
    assert status == 200 and same(found["outputs"][0]["data"], expected.flatten())


def test_invocations_with_bytes(alone: Running, folder: Path) -> None:
    x = torch.randn(2, 4)
    tensor = {"name": "input_1", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 32}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    kind = "application/vnd.sagemaker-triton.binary+json;json-header-size="
    status, headers, body = alone.raw(
        "POST", "/invocations", head + x.numpy().tobytes(), {"content-type": f"{kind}{len(head)}"}
    )
    assert status == 200 and headers["content-type"].startswith(kind)
    length = int(headers["content-type"].removeprefix(kind))
    assert json.loads(body[:length])["outputs"][0]["shape"] == [2, 3]
    assert body[length:] == network(folder, "line")(x).numpy().tobytes()


def test_of_several_models_the_header_says_which(service: Running, folder: Path) -> None:
    x = torch.randn(2, 4)
    status, found = service.json("POST", "/invocations", {"instances": x.tolist()})
    assert status == 400 and "X-Amzn-SageMaker-Target-Model must say which model: line, twins" in found["error"]
    target = {"X-Amzn-SageMaker-Target-Model": "line"}
    status, found = service.json("POST", "/invocations", {"instances": x.tolist()}, **target)
    assert status == 200 and same(found["predictions"], network(folder, "line", 3)(x))


def test_an_invocation_of_another_type_is_refused(alone: Running) -> None:
    status, _, body = alone.raw("POST", "/invocations", b"1,2,3,4", {"content-type": "text/csv"})
    assert status == 415 and "Content-Type 'text/csv' is not read here" in json.loads(body)["error"]


# ---- Prometheus -----------------------------------------------------------------------------------------------------


def test_metrics_are_prometheus_text_and_count(alone: Running) -> None:
    def samples() -> dict[tuple[str, str], float]:
        status, headers, body = alone.raw("GET", "/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain")
        families = list(text_string_to_metric_families(body.decode()))
        assert all(family.documentation for family in families)
        return {(s.name, s.labels.get("outcome", "")): s.value for family in families for s in family.samples}

    alone.json("POST", "/invocations", {"instances": [[0.0] * 4] * 3})
    before = samples()
    alone.json("POST", "/invocations", {"instances": [[0.0] * 4] * 3})
    after = samples()
    answered, rows = ("pykernels_requests_total", "answered"), ("pykernels_rows_total", "")
    assert after[answered] == before[answered] + 1 and after[rows] == before[rows] + 3
    assert after["pykernels_instances", ""] == 1 and after["pykernels_request_bytes", ""] == 0

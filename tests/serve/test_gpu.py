"""Networks on a GPU behind the server, with a stand-in for it: batches, graphs before ready, refusals, manifests."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import tritonclient.grpc
import yaml
from torch import nn
from typer.testing import CliRunner

import pykernels as pk
from pykernels.cli import serve as command
from pykernels.cli.main import app
from pykernels.cuda.graphs import PATIENCE
from pykernels.parallel import Split, split
from pykernels.serve import manifests
from pykernels.serve.costs import sizes
from pykernels.serve.service import Options, Service, on_a_gpu
from tests.networks import Function
from tests.serve.serving import Running, serving
from tests.stand_in import Gpu


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "line.pk"
    pk.optimize(nn.Linear(4, 3), (torch.randn(2, 4),)).save(path)
    return path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch, count=2)


def ask(place: Running, x: torch.Tensor, name: str = "line") -> torch.Tensor:
    status, said = place.json("POST", f"/v1/models/{name}:predict", {"instances": x.tolist()})
    assert status == 200, said
    return torch.tensor(said["predictions"])


def config(place: Running, name: str = "line") -> dict[str, Any]:
    found: dict[str, Any] = place.json("GET", f"/v2/models/{name}/config")[1]
    return found


# --- what is served ---


def test_a_graph_of_every_batch_size_is_captured_before_it_is_ready(net: Path, gpu: Gpu) -> None:
    network = pk.load(net)
    with serving(models={"line": str(net)}, device="cuda", batch=32, batch_error=1e-5) as place:
        assert config(place)["dynamic_batching"]["preferred_batch_size"] == sizes(32)
        captured = gpu.captured
        assert captured >= len(sizes(32)) == 8 == len(gpu.graphs[0][0])  # all that are kept are of these sizes
        for rows in sizes(32):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(ask(place, x), network(x), rtol=1e-5, atol=1e-6)
        assert gpu.captured == captured


def test_its_configuration_says_where_it_runs(net: Path, gpu: Gpu) -> None:
    with serving(models={"line": str(net)}, device="cuda:1") as place:
        expected = {"name": "line_0", "kind": "KIND_GPU", "gpus": [1], "count": 1}
        assert config(place)["instance_group"] == [expected]
        with tritonclient.grpc.InferenceServerClient(place.grpc) as client:
            (group,) = client.get_model_config("line", as_json=True)["config"]["instance_group"]
        assert group == expected
    with serving(models={"line": str(net)}) as place:
        assert config(place)["instance_group"] == [{"name": "line_0", "kind": "KIND_CPU", "count": 1}]


def test_what_counts_is_the_memory_of_weights_on_the_device(net: Path, gpu: Gpu) -> None:
    with serving(models={"line": str(net)}, device="cuda") as place:
        (model,) = place.service.repository.mapped.values()
        assert model.bytes == pk.load(net).report().bytes_after != net.stat().st_size
        assert f'pykernels_mapped_bytes{{model="line",version="1"}} {float(model.bytes)}' in str(
            place.raw("GET", "/metrics")
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_that_differ_from_their_rows_are_formed_as_far_as_it_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The network adds a thousandth of the batch's mean to every row."""
    Gpu(monkeypatch)
    pk.optimize(Function(lambda _, x: x + 1e-3 * x.mean(0, keepdim=True)), (torch.randn(2, 4),)).save(
        tmp_path / "net.pk"
    )
    found = {}
    for error in (0.0, 1e-6, 1e-2):
        with serving(models={"net": str(tmp_path / "net.pk")}, device=device, batch=2, batch_error=error) as place:
            found[error] = config(place, "net")
    apart = {error: c["parameters"]["apart"]["string_value"] for error, c in found.items() if "parameters" in c}
    assert apart == {
        0.0: "a batch of 2 does not give the bits of its rows one by one",
        1e-6: "a batch of 2 is more than 1e-06 of its largest value off those of its rows one by one",
    }
    assert found[1e-2]["max_batch_size"] == 2


# --- what is refused ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_at_the_start(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_needs", lambda modules: None)  # Ray among them
    with pytest.raises(ValueError, match="device: cuda cannot be used: "):
        Service(Options({"line": str(net)}, device="cuda"))
    for place in ([], ["--in-process"]):
        assert "--device: cuda cannot be used: " in serve(net, "--device", "cuda", *place, status=1)
    pk.Setup(1, 1, device="cuda").save(tmp_path / "setup.json")
    said = serve(net, "--setup", tmp_path / "setup.json", "--in-process", status=1)
    assert "--device: cuda cannot be used: " in said


class Parts:
    """Stands for the processes of a split network's parts."""

    death, restarts = None, 0

    def __init__(self, folder: Path, threads: int, in_flight: int, devices: list[str]) -> None:
        self.split, self.devices, self.calls = Split.load(folder), devices, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.split(*args, **kwargs)

    def close(self) -> None:
        pass


def test_parts_of_a_split_network_have_a_gpu_after_the_other(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Parts] = []

    def of_folder(folder: Path, threads: int, **given: Any) -> Parts:
        made.append(Parts(folder, threads, **given))
        return made[-1]

    monkeypatch.setattr("pykernels.serve.linked.Chain.of_folder", of_folder)
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    network = pk.optimize(layers, (torch.randn(2, 4),))
    split(network, 3, rounds=1).save(tmp_path / "big")
    for device, where, numbers in (("cuda", ["cuda:0", "cuda:1", "cuda:0"], [0, 1]), ("cuda:1", ["cuda:1"] * 3, [1])):
        with serving(models={"big": str(tmp_path / "big")}, device=device, parts=3, batch=2) as place:
            x = torch.randn(2, 4)
            assert torch.equal(ask(place, x, "big"), network(x))
            assert config(place, "big")["instance_group"][0]["gpus"] == numbers
            assert config(place, "big")["instance_group"][0]["kind"] == "KIND_GPU"
        assert made[-1].devices == where and made[-1].calls >= 2 * PATIENCE  # each size until its graphs are there


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"device": "tpu"}, "device: must be cpu, cuda or cuda:N, not 'tpu'"),
        ({"device": 1}, "device: must be cpu, cuda or cuda:N, not 1"),
        ({"gpus": 0.0}, "gpus: must be above 0, and at most 1, not 0.0"),
        ({"gpus": 2.0}, "gpus: must be above 0, and at most 1, not 2.0"),
        ({"batch_error": -1.0}, "batch_error: must be at least 0, and less than 1, not -1.0"),
    ],
)
def test_options_that_cannot_be_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Options({"line": "line.pk"}, **fields)


# --- the command ---


def serve(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return re.sub(r"\x1b\[[0-9;]*m", "", done.output).replace("\n", " ")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served, and how many replicas, in place of serving it."""
    found: list[Any] = []
    monkeypatch.setattr(command, "_run", lambda options, replicas, *place: found.append((options, replicas)))
    monkeypatch.setattr(command, "_needs", lambda modules: None)  # Ray among them
    monkeypatch.setattr(command, "usable", type("Eight", (), {"count": 8}))
    return found


@pytest.mark.parametrize(
    "arguments, replicas, instances",
    [
        ([], 2, 2),  # a process for each GPU, two calls at once in each: one computes, one is copied
        (["--gpus-per-replica", "0.5"], 4, 2),
        (["--replicas", "1", "--threads", "8"], 1, 1),
        (["--in-process"], 1, 2),
        (["--in-process", "--replicas", "3", "--device", "cuda:1"], 1, 3),
    ],
)
def test_replicas_fill_the_gpus(
    net: Path, gpu: Gpu, asked: list[Any], arguments: list[str], replicas: int, instances: int
) -> None:
    serve(net, "--device", "cuda", *arguments)
    ((options, found),) = asked
    assert (found, options.instances, options.device[:4]) == (replicas, instances, "cuda")


def test_a_setup_says_where_unless_the_command_does(net: Path, gpu: Gpu, asked: list[Any], tmp_path: Path) -> None:
    pk.Setup(1, 3, 64, "cuda").save(tmp_path / "setup.json")
    serve(net, "--setup", tmp_path / "setup.json")
    serve(net, "--setup", tmp_path / "setup.json", "--in-process")
    serve(net, "--setup", tmp_path / "setup.json", "--in-process", "--device", "cuda:1", "--max-batch", 8)
    found = [(o.device, o.instances, o.batch, replicas) for o, replicas in asked]
    assert found == [("cuda", 3, 64, 2), ("cuda", 3, 64, 1), ("cuda:1", 3, 8, 1)]
    said = serve(net, "--setup", tmp_path / "setup.json", "--device", "cpu", status=1)
    assert "--device: the setup is one for cuda, not for cpu" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "tpu"], "--device: 'tpu' is no device"),
        (["--device", "cuda:1"], "--device: on Ray it is cuda, and Ray says which, not cuda:1"),
        (["--device", "cuda:2", "--in-process"], "--device: cuda:2 cannot be used: torch finds 2 CUDA devices here"),
        (["--device", "cuda", "--replicas", "3"], "--replicas: 3 of 1 GPUs each are more than the 2 that fit here"),
        (["--device", "cuda", "--gpus-per-replica", "0"], "--gpus-per-replica: must be above 0, and at most 1, not 0"),
        (["--batch-error", "1"], "--batch-error: must be at least 0, and less than 1, not 1"),
    ],
)
def test_mistakes_are_named(net: Path, gpu: Gpu, asked: list[Any], arguments: list[str], message: str) -> None:
    assert message in serve(net, *arguments, status=1)


# --- the cluster ---


def test_gpus_are_shared_as_far_as_they_go() -> None:
    assert [on_a_gpu(gpus) for gpus in (1, 0.6, 0.5, 1 / 3, 0.3, 0.25)] == [1, 1, 2, 3, 3, 4]


def test_pods_have_a_gpu_each_and_the_cores_of_its_replicas(tmp_path: Path) -> None:
    options = Options({"line": "/srv/line.pk"}, instances=2, device="cuda", gpus=0.5)
    manifests.write(tmp_path, options, 3, 8000, 8001)
    service = yaml.safe_load((tmp_path / "rayservice.yaml").read_text())
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    for granted in container["resources"].values():
        assert (granted["nvidia.com/gpu"], granted["cpu"]) == ("1", "4")
    assert workers["replicas"] == 2 and workers["rayStartParams"] == {"num-cpus": "4", "num-gpus": "1"}
    (head,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    (application,) = yaml.safe_load((tmp_path / "serve.yaml").read_text())["applications"]
    assert (application["args"]["device"], application["args"]["gpus"], application["args"]["replicas"]) == (
        "cuda",
        0.5,
        3,
    )
    image = (tmp_path / "Dockerfile").read_text()
    assert "pykernels[serve,gpu]" in image and '"--device", "cuda"' in image and "docker run --gpus all" in image


def test_ray_gives_a_replica_its_share_of_a_gpu() -> None:
    engine = pytest.importorskip("pykernels.serve.engine", reason="Ray is not installed")
    options = Options({"line": "/srv/line.pk"}, instances=2, device="cuda", gpus=0.5)
    asked = {device: _resources(engine, options, device) for device in ("cpu", "cuda")}
    assert asked["cuda"]["num_gpus"] == 0.5 and asked["cuda"]["num_cpus"] == 2
    assert not asked["cpu"].get("num_gpus")
    with pytest.raises(ValueError, match="device: on Ray it is cuda, and Ray says which, not cuda:0"):
        _resources(engine, options, "cuda:0")


def _resources(engine: Any, options: Options, device: str) -> dict[str, Any]:
    found: dict[str, Any] = engine.bind(
        dataclasses.replace(options, device=device), 1
    )._bound_deployment.ray_actor_options
    return found

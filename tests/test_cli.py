"""The command `pykernels`: what it prints, what it writes, and what it says when it is held wrong."""

from __future__ import annotations

import builtins
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pykernels as pk
from pykernels.bench import machine, peaks
from pykernels.cli.main import app
from pykernels.cuda import registry
from pykernels.ops import _load

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()

def half():
    return build().half()

def flat():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2)).eval()

def parted():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LogSoftmax(1), nn.Conv2d(4, 2, 1)).eval()

def torchs():
    return nn.LogSoftmax(1)

def loader():
    return [torch.randn(4, 3, 16, 16) for _ in range(3)]

def score(network):
    return float(network(torch.zeros(1, 3, 16, 16)).isfinite().all())

def words():
    return nn.Linear(6, 4).eval()

def nothing():
    return 3
"""


def pykernels(*arguments: object, status: int = 0) -> str:
    """Run the command; its whole output, colours taken out and line breaks undone."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return re.sub(r"\x1b\[[0-9;]*m", "", done.output)


@pytest.fixture
def nets(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A working folder with a module of the user's own, named so that no test sees another's."""
    name = f"nets_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return pathlib.Path(name)


def test_help_names_every_command() -> None:
    text = pykernels("--help")
    for command in ("doctor", "optimize", "compress", "plan", "tune", "split", "part", "bench", "comm"):
        assert re.search(rf"\b{command}\b", text)
        assert "Usage" in pykernels(command, "--help")


def test_version() -> None:
    assert pykernels("--version").strip() == pk.__version__


# ---- doctor ----------------------------------------------------------------------------------------------------------
def test_doctor_tells_torch_threads_and_the_isa_in_force() -> None:
    text = pykernels("doctor")
    assert torch.__version__ in text
    assert re.search(rf"^threads +{torch.get_num_threads()} ", text, re.MULTILINE)
    assert re.search(rf"^isa +{torch.ops.pykernels._isa()}, ", text, re.MULTILINE)
    for isa in ("scalar yes", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"):
        assert isa in text


def test_doctor_lists_every_public_op_as_the_dispatcher_knows_it() -> None:
    text = pykernels("doctor")
    support = {op.name: op for op in machine.op_support()}
    assert support
    assert not [name for name in support if name.startswith("_")]
    for name, op in support.items():
        assert re.search(rf"\b{name} +│ +{'yes' if op.cpu else 'no'} ", text), name
        assert op.cpu and not op.cuda, name


def test_doctor_says_why_there_is_no_cuda() -> None:
    text = pykernels("doctor")
    for what in ("ops", "library"):
        assert re.search(rf"^CUDA {what} +no: torch \S+ is built without CUDA", text, re.MULTILINE)
    assert "checked on an H100 on 2026-11-26; what changed since has run on no GPU; no speed claimed" in " ".join(
        text.split()
    )


def test_doctor_fails_and_says_why_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "CPU_ERROR", "the library is on holiday")
    text = pykernels("doctor", status=1)
    assert "the library is on holiday" in text
    assert re.search(r"^isa +none, the CPU library is not loaded", text, re.MULTILINE)


# ---- optimize --------------------------------------------------------------------------------------------------------
def test_optimize_saves_a_network_that_answers_as_the_model(nets: pathlib.Path) -> None:
    text = pykernels("optimize", f"{nets}:build", "--input-shape", "1,3,16,16", "-o", "net.pk", "--tune")
    assert "fused" in text
    model = __import__(str(nets)).build()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pk.load("net.pk")(x), model(x), rtol=1e-4, atol=1e-5)


def test_optimize_takes_an_exported_program(nets: pathlib.Path) -> None:
    pykernels("--version")
    namespace: dict[str, object] = {}
    exec(NETWORK, namespace)
    model = namespace["build"]()  # type: ignore[operator]
    x = torch.randn(1, 3, 16, 16)
    torch.export.save(torch.export.export(model, (x,)), "net.pt2")
    pykernels("optimize", "net.pt2", "--input-shape", "1,3,16,16", "-o", "net.pk")
    torch.testing.assert_close(pk.load("net.pk")(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["build", "half"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.filterwarnings("ignore:calibration")
def test_optimize_takes_models_and_precisions_of_16_bit_floats(nets: pathlib.Path, name: str, precision: str) -> None:
    arguments = ["--device", "cpu", "--precision", precision, "--input-shape", "1,3,16,16", "-o", "net.pk"]
    pykernels("optimize", f"{nets}:{name}", *arguments)
    x = torch.randn(2, 3, 16, 16)
    y = pk.load("net.pk")(x.half() if name == "half" else x)
    assert y.dtype == (torch.float16 if name == "half" else torch.float32)
    expected = __import__(str(nets)).build()(x)
    assert (y - expected).norm() <= 0.2 * expected.norm()


def test_a_machine_with_fewer_gpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ERROR", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert registry.unusable(torch.device("cuda")) is None and registry.unusable(torch.device("cuda:0")) is None
    assert registry.unusable(torch.device("cuda:1")) == "torch finds 1 CUDA device here"
    assert registry.unusable(torch.device("cpu")) is None


def test_optimize_calibrates_int8_on_photographs_and_tensors(nets: pathlib.Path) -> None:
    folder = pathlib.Path("photographs")
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    np.save(folder / "b.npy", np.zeros((2, 3, 16, 16), np.float32))
    torch.save(torch.ones(1, 3, 16, 16), folder / "c.pt")
    arguments = ["--precision", "int8", "--calibration", folder, "--input-shape", "1,3,16,16", "-o", "net.pk"]
    assert "int8" in pykernels("optimize", f"{nets}:build", *arguments)
    model = __import__(str(nets)).build()
    x = torch.rand(1, 3, 16, 16)
    reference = model(x)
    assert (pk.load("net.pk")(x) - reference).norm() < 0.1 * reference.norm()
    pytest.importorskip("highspy")
    arguments[1] = "auto"
    assert "precision auto, error at most 1e-07: fp32" in pykernels(
        "optimize", f"{nets}:build", *arguments, "--error", "1e-7"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{nets}:build", "--input-shape", "1,x"], "--input-shape: '1,x' is not a list of numbers"),
        (["{nets}:build", "--input-shape", "1,0"], "--input-shape: sizes are whole numbers of at least 1"),
        (["{nets}", "--input-shape", "1"], "is neither a .pt2 or .onnx file nor module:callable"),
        (["{nets}:absent", "--input-shape", "1"], "has no attribute 'absent'"),
        (["{nets}:nothing", "--input-shape", "1"], "returned int, not an nn.Module"),
        (["absent.pt2", "--input-shape", "1"], "there is no file absent.pt2"),
        (["no_such_module_here:build", "--input-shape", "1"], "No module named 'no_such_module_here'"),
        (["{nets}:build", "--input-shape", "1,3,8,8", "-o", "absent/net.pk"], "the folder absent does not exist"),
        (["{nets}:build", "--input-shape", "1,3,8,8", "--calibration", "."], "only for --precision int8"),
        (["{nets}:build", "--input-shape", "1,3,8,8", "--error", "0.1"], "only for --precision auto"),
        (["{nets}:build", "--input-shape", "1,3,8,8", "--precision", "auto"], "auto needs --calibration"),
        (["{nets}:build", "--input-shape", "1,3,8,8", "--device", "tpu9"], "--device: 'tpu9' is no device"),
        (
            ["{nets}:build", "--input-shape", "1,3,8,8", "--device", "meta"],
            "--device: meta cannot be used: our kernels",
        ),
        (
            ["{nets}:build", "--input-shape", "1,3,8,8", "--device", "cuda:1"],
            f"--device: cuda:1 cannot be used: torch {torch.__version__} is built without CUDA",
        ),
        (
            ["{nets}:build", "--input-shape", "1,3,8,8", "--precision", "int8", "--calibration", "absent"],
            "--calibration: absent is not a folder",
        ),
    ],
)
def test_optimize_names_the_argument_that_is_wrong(nets: pathlib.Path, arguments: list[str], message: str) -> None:
    given = [argument.format(nets=nets) for argument in arguments]
    if "-o" not in given:
        given += ["-o", "net.pk"]
    text = pykernels("optimize", *given, status=1)
    assert message in text
    assert not pathlib.Path("net.pk").exists()


def test_optimize_refuses_an_empty_calibration_folder_and_a_tensor_of_another_shape(nets: pathlib.Path) -> None:
    folder = pathlib.Path("empty")
    folder.mkdir()
    arguments = [
        f"{nets}:build",
        "--precision",
        "int8",
        "--calibration",
        folder,
        "--input-shape",
        "1,3,16,16",
        "-o",
        "net.pk",
    ]
    assert "holds no image and no .pt or .npy file" in pykernels("optimize", *arguments, status=1)
    np.save(folder / "b.npy", np.zeros((2, 3, 8, 8), np.float32))
    assert "must hold one tensor of shape [N, 3, 16, 16]" in pykernels("optimize", *arguments, status=1)


# ---- plan ------------------------------------------------------------------------------------------------------------
def saved(name: str = "build", *shape: int) -> pathlib.Path:
    """One of the networks, optimized for an input of this shape, as a file in the working folder."""
    namespace: dict[str, Any] = {}
    exec(NETWORK, namespace)
    pk.optimize(namespace[name](), (torch.randn(shape or (1, 3, 16, 16)),)).save(f"{name}.pk")
    return pathlib.Path(f"{name}.pk")


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks that cost no time; nothing reaches them."""
    rates = {"fp32": 1e18, "bf16": 1e18, "int8": 1e18}
    monkeypatch.setattr(peaks, "measure", lambda: peaks.Peaks(rates, (peaks.Level("DRAM", None, 1e18, 1e18),)))


@pytest.mark.usefixtures("folder")
def test_plan_show_lists_kernel_calls_and_memory() -> None:
    path, before = saved(), torch.get_num_threads()
    text = pykernels("plan", "show", path, "--batch", 2, "--size", "20x24", "--threads", 1)
    operations = 2 * 2 * 8 * 10 * 12 * 27 / 1e6
    assert re.search(rf"^0: conv2d \+ relu +convolution +2x8x10x12 +{operations:.1f} ", text, re.MULTILINE)
    assert re.search(r"^5: linear +product +2x4 ", text, re.MULTILINE)
    assert "in 1 plan; left to torch between: nothing" in text
    assert re.search(r"memory between the steps [\d.]+ MB, of which no placement could do without [\d.]+", text)
    assert f"isa {torch.ops.pykernels._isa()}, 1 thread\n" in text
    assert torch.get_num_threads() == before
    assert "1x8x8x8" in pykernels("plan", "show", path)  # the example's sizes


@pytest.mark.usefixtures("folder")
def test_plan_show_names_what_torch_does_between_plans() -> None:
    text = pykernels("plan", "show", saved("parted"))
    assert re.search(r"in 2 plans; left to torch between: 1 aten\.\w*log_softmax", text)


@pytest.mark.usefixtures("folder", "measured")
def test_plan_profile_times_each_kernel_call() -> None:
    text = pykernels("plan", "profile", saved(), "--rounds", 3, "--chart", "plan.svg")
    assert re.search(r"^0: conv2d \+ relu +convolution .* [\d.]+ +0 % (ops|bytes) +\d+ +[\d.]+$", text, re.MULTILINE)
    assert re.search(r"^kernels [\d.]+ ms, 0 % of the limit; whole call [\d.]+ ms: a call costs ", text, re.MULTILINE)
    assert "this machine's peaks: fp32 1000000000, " in text and "written: plan.svg" in text
    assert "<svg" in pathlib.Path("plan.svg").read_text()
    pykernels("plan", "profile", saved("parted"), "--rounds", 2, "--chart", "plan.PNG")
    assert pathlib.Path("plan.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("folder")
def test_plan_profile_measures_the_machine_for_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found, measure = [], peaks.measure

    def shortly() -> peaks.Peaks:
        found.append((torch.get_num_threads(), measure(0.001)))
        return found[-1][1]

    monkeypatch.setattr(peaks, "measure", shortly)
    text = pykernels("plan", "profile", saved(), "--rounds", 2, "--threads", 1)
    ((threads, rates),) = found
    assert threads == 1 and f"peaks: fp32 {rates.operations['fp32'] / 1e9:.0f}, " in text


@pytest.mark.usefixtures("folder", "measured")
def test_plan_profile_says_what_the_chart_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    text = pykernels("plan", "profile", saved(), "--rounds", 1, "--chart", "plan.png", status=1)
    assert "--chart: the chart needs matplotlib: pip install matplotlib" in text


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["show", "profile"])
def test_plan_names_the_argument_that_is_wrong(command: str) -> None:
    path, words = saved("flat"), saved("words", 2, 6)
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    pathlib.Path("damaged.pk").write_bytes(damaged)
    for arguments, message in (
        (["absent.pk"], "NETWORK: absent.pk does not exist"),
        (["damaged.pk"], "NETWORK: damaged.pk cannot be loaded: "),
        (["."], "NETWORK: . cannot be loaded: it is no regular file"),
        ([saved("torchs", 2, 3)], "NETWORK: the network has no plans: "),
        ([path, "--size", "20"], "--size: '20' is not a height and a width: 224x224 is"),
        ([path, "--size", "0x20"], "--size: '0x20' is not a height and a width"),
        ([path, "--size", "20x18"], "--size: it refuses inputs of [1, 3, 20, 18]: "),
        ([path, "--batch", 2, "--size", "2x2"], "--batch, --size: it refuses inputs of [2, 3, 2, 2]: "),
        ([words, "--size", "8x8"], "--size: the network has no input of four dimensions"),
    ):
        assert message in pykernels("plan", command, *arguments, status=1)


@pytest.mark.usefixtures("folder")
def test_plan_profile_refuses_charts_that_it_cannot_write() -> None:
    path = saved()
    text = pykernels("plan", "profile", path, "--chart", "plan.txt", status=1)
    assert "--chart: plan.txt must end in .png or .svg" in text
    text = pykernels("plan", "profile", path, "--chart", "absent/plan.png", status=1)
    assert "--chart: the folder absent does not exist" in text


# ---- compress ------------------------------------------------------------------------------------------------------
def test_compress_saves_network_recipe_weights_and_chart(nets: pathlib.Path) -> None:
    data = pathlib.Path("data")
    data.mkdir()
    for number in range(2):
        np.save(data / f"{number}.npy", np.random.default_rng(number).standard_normal((4, 3, 16, 16), dtype=np.float32))
    path = f"{nets}.py:build"
    shape = ["--input-shape", "1,3,16,16"]
    files = ["-o", "small.pk", "--weights", "small.pt", "--chart", "chart.svg"]
    options = ["--data", "data", "--validate", f"{nets}:score", "--drop", 0.5, "--rounds", 0]
    text = pykernels("compress", path, *shape, *options, *files)
    assert "original, fp32" in text and "original, int8" in text and "chosen" in text
    model = __import__(str(nets)).build()
    model.load_state_dict(torch.load("small.pt", weights_only=True))
    x = torch.randn(2, 3, 16, 16)
    y = pk.load("small.pk")(x)
    assert (y - model(x)).norm() <= 0.2 * model(x).norm()
    assert pathlib.Path("chart.svg").stat().st_size > 1000
    recipe = json.loads(pathlib.Path("small.json").read_text())
    assert recipe["version"] == 1 and recipe["prune"] is None
    again = pykernels("compress", path, *shape, *options[:4], "--recipe", "small.json", "-o", "again.pk")
    assert "chosen" in again
    repeated = pk.load("again.pk")(x)
    assert torch.equal(repeated, y)


def test_compress_saves_what_was_reached_where_the_budget_cannot_be_kept(nets: pathlib.Path) -> None:
    options = ["--train", f"{nets}:loader", "--latency", 0.001, "--drop", 0.5, "--rounds", 0, "-o", "small.pk"]
    text = pykernels("compress", f"{nets}:build", "--input-shape", "1,3,16,16", *options, status=1)
    assert "budget: no network that was made takes at most 0.001" in text and "saved small.pk" in text
    assert pk.load("small.pk")(torch.randn(2, 3, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--data: there is nothing to judge by"),
        (["--validate", "{nets}:score", "--drop", -1], "--drop: -1.0; it must not be negative"),
        (["--data", "nowhere"], "--data: nowhere is not a folder"),
        (["--train", "{nets}:absent"], "--train: "),
        (["--train", "loader"], "--train: 'loader' is no module:callable"),
        (["--train", "missing.py:loader"], "--train: there is no file missing.py"),
        (["--validate", "{nets}:score", "--steps", 3], "--steps: without train nothing is distilled"),
        (["--recipe", "missing.json"], "--recipe: missing.json cannot be read"),
        (["--chart", "chart.txt"], "--chart: chart.txt must end in .png or .svg"),
        (["--weights", "nowhere/small.pt"], "--weights: the folder nowhere does not exist"),
    ],
)
def test_compress_names_the_option_that_is_wrong(nets: pathlib.Path, arguments: list[object], message: str) -> None:
    given = [str(a).replace("{nets}", str(nets)) for a in arguments]
    options = ["--input-shape", "1,3,16,16", "-o", "small.pk", *given]
    assert message in pykernels("compress", f"{nets}:build", *options, status=1)
    assert not pathlib.Path("small.pk").exists()


# ---- split, part -----------------------------------------------------------------------------------------------------
def test_split_writes_parts_and_part_says_what_it_needs(nets: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYKERNELS_PIPELINE_KEY", raising=False)
    pykernels("optimize", f"{nets}:build", "--input-shape", "1,3,16,16", "-o", "net.pk")
    text = pykernels("split", "net.pk", "--stages", "2", "-o", "parts")
    assert "part 1" in text and "balance" in text
    x = torch.randn(3, 3, 16, 16)
    parts = [pk.load(path) for path in ("parts/part-1-of-2.pk", "parts/part-2-of-2.pk")]
    assert torch.equal(parts[1](*parts[0](x)), pk.load("net.pk")(x))
    assert "stages: the network can be cut into" in pykernels("split", "net.pk", "--stages", 99, "-o", "n", status=1)
    where = "--listen", "127.0.0.1:9001", "--next", "127.0.0.1:9002"
    assert "PYKERNELS_PIPELINE_KEY" in pykernels("part", "parts/part-1-of-2.pk", *where, status=1)
    assert "neither a path nor host:port" in pykernels("part", "parts/part-1-of-2.pk", *where[:3], "there", status=1)
    assert "FILE: net.pk is no part of a network that was split" in pykernels("part", "net.pk", *where, status=1)
    assert "FILE: " in (text := pykernels("part", "parts/none.pk", *where, status=1)) and "parts/none.pk" in text


# ---- tune ------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("folder")
def test_tune_prints_what_was_tried_and_saves_the_setup() -> None:
    text = pykernels("tune", saved(), "--seconds", 0.6, "-o", "setup.json")
    setup = pk.Setup.load("setup.json")
    assert setup.report() in text and "saved setup.json" in text
    assert re.search(rf"^ +cpu +{setup.threads} +1 +1 .* chosen$", text, re.MULTILINE)
    assert (setup.instances, setup.device, setup.bound_ms) == (1, "cpu", None)
    assert "--devices: must be some of cpu, cuda" in pykernels("tune", saved(), "--devices", "cpu,tpu", status=1)
    assert "most items/s with p99 up to 1e+06 ms" in pykernels(
        "tune", saved("words", 2, 6), "--latency-ms", 1e6, "--seconds", 1
    )


@pytest.mark.usefixtures("folder")
def test_tune_takes_networks_of_keyword_inputs() -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * scale

    x, scale = torch.randn(2, 6), torch.randn(2, 1)
    pk.optimize(Scaled(6, 4).eval(), (x,), example_kwargs={"scale": scale}).save("scaled.pk")
    assert "chosen" in pykernels("tune", "scaled.pk", "--seconds", 0.3)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pk"], "NETWORK: absent.pk does not exist"),
        (["{net}", "--latency-ms", -1], "--latency-ms: must be a finite number above 0, not -1.0"),
        (["{net}", "--seconds", 0], "--seconds: must be a finite number above 0, not 0.0"),
        (["{net}", "-o", "absent/setup.json"], "--output: the folder absent does not exist"),
        (
            ["{net}", "--latency-ms", 1e-6, "--seconds", 0.5],
            "--latency-ms: no setup keeps a p99 of 1e-06 ms; the best p99",
        ),
    ],
)
def test_tune_names_the_argument_that_is_wrong(arguments: list[object], message: str) -> None:
    net = saved("words", 2, 6) if "{net}" in arguments else None
    assert message in pykernels("tune", *[net if a == "{net}" else a for a in arguments], status=1)

"""What every op owes the framework: shape functions, opcheck, compile, export, AOTInductor, inference mode, autocast.

Autocast: an op computes in the dtype of what it is given and is not in autocast's lists, so autocast leaves it alone.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from contract import Sample, samples
from torch.utils._pytree import tree_leaves

from pykernels.ops import conv, linear, quantize

SAMPLES = samples()
# These name the process, not a computation: no tensors, so nothing to trace.
NOT_TENSOR_OPS = {
    "_isa",
    "_set_isa",
    "_set_winograd",
    "_set_by_image",
    "_peak",
    "_bandwidth",
    "_describe_plan",
    "_profile_plan",
    "_forget_plans",
}
DIFFERENTIABLE = {
    "conv_bn_act",
    "max_pool2d",
    "max_pool2d_with_indices",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
}

every_op = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


def schema() -> set[str]:
    return {
        s.name.removeprefix("pykernels::")
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("pykernels::")
    }  # fmt: skip


def same(actual: Any, expected: Any) -> None:
    """Bit-equal values in equal strides."""
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, check_stride=True, equal_nan=True)


class Call(torch.nn.Module):
    """The op as a model: batched tensors are its inputs, others its buffers."""

    def __init__(self, sample: Sample, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.sample = sample
        self.constants = [name for name in tensors if name not in sample.batched]
        for name in self.constants:
            self.register_buffer(f"_{name}", tensors[name])

    def forward(self, *inputs: torch.Tensor) -> Any:
        tensors = dict(zip(self.sample.batched, inputs, strict=True))
        tensors |= {name: getattr(self, f"_{name}") for name in self.constants}
        return self.sample.call(**tensors)


def model(sample: Sample, batch: int = 3) -> tuple[Call, tuple[torch.Tensor, ...]]:
    tensors = sample.make(batch)
    return Call(sample, tensors), tuple(tensors[name] for name in sample.batched)


def inputs(sample: Sample, batch: int) -> tuple[torch.Tensor, ...]:
    tensors = sample.make(batch)
    return tuple(tensors[name] for name in sample.batched)


# --- completeness ---


def test_every_op_of_the_schema_has_a_sample() -> None:
    assert schema() - NOT_TENSOR_OPS == {sample.op for sample in SAMPLES}


def test_every_op_has_a_shape_function() -> None:
    find = torch._library.simple_registry.singleton.find
    missing = [op for op in schema() - NOT_TENSOR_OPS if find(f"pykernels::{op}").fake_impl.kernel is None]
    assert missing == []


def registrations(op: str) -> dict[str, str]:
    """Dispatch key -> where its kernel was registered: a C++ or a Python file."""
    lines = torch._C._dispatch_dump(f"pykernels::{op}").splitlines()
    pairs = (line.split(": registered at ") for line in lines if ": registered at " in line)
    return {key.removesuffix("[alias]"): place for key, place in pairs}


def test_ops_with_a_gradient_are_those_of_the_table() -> None:
    assert {op for op in schema() if "Autograd" in registrations(op)} == DIFFERENTIABLE


def test_no_python_stands_before_a_kernel_without_gradient() -> None:
    for op in schema() - DIFFERENTIABLE:
        before_fake = {key: place for key, place in registrations(op).items() if key not in ("Meta", "debug")}
        assert set(before_fake) <= {"CPU", "CompositeExplicitAutograd"}, op
        assert all(".py" not in place for place in before_fake.values()), op


# --- one op at a time ---


@every_op
def test_opcheck(sample: Sample) -> None:
    tensors = sample.make(3)
    arguments = sample.arguments(tensors)
    op = getattr(torch.ops.pykernels, sample.op).default
    torch.library.opcheck(op, (), {**arguments, **sample.rest})


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.op in DIFFERENTIABLE], ids=lambda sample: sample.name)
def test_opcheck_with_gradients(sample: Sample) -> None:
    tensors = {
        name: t.requires_grad_() if t.is_floating_point() and not name.startswith("running") else t
        for name, t in ((name, t.detach().clone()) for name, t in sample.make(2).items())
    }
    if not tensors["x"].requires_grad:
        return
    torch.library.opcheck(getattr(torch.ops.pykernels, sample.op).default, (), {**tensors, **sample.rest})


def compiles(sample: Sample, dynamic: bool) -> None:
    """One graph that calls the op once and is right for every batch size."""
    torch._dynamo.reset()
    module, _ = model(sample)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    sizes = (11, 13) if dynamic else (11,)  # equal to no other size, or the tracer takes them for one
    for count, batch in enumerate(sizes):
        values = inputs(sample, batch)
        same(compiled(*values), module(*values))
        if count == 0:
            before = len(graphs)  # the tracer may have begun again before it found out that numbers are constants
    assert len(graphs) == before
    calls = [node.target for node in graphs[-1].graph.nodes if node.op == "call_function"]
    assert len([target for target in calls if "pykernels" in str(target)]) == 1


@every_op
def test_compiles_to_one_graph_for_every_batch_size(sample: Sample) -> None:
    compiles(sample, dynamic=True)


@pytest.mark.parametrize("sample", {s.op: s for s in SAMPLES}.values(), ids=lambda sample: sample.name)
def test_compiles_with_fixed_sizes(sample: Sample) -> None:
    compiles(sample, dynamic=False)


@every_op
def test_exports_and_reloads(sample: Sample) -> None:
    module, example = model(sample)
    shapes = {"inputs": tuple({0: torch.export.Dim.DYNAMIC} for _ in example)}
    program = torch.export.export(module, example, dynamic_shapes=shapes if example else None)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"pykernels.{sample.op}.default" in targets
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    again = torch.export.load(saved).module()
    for batch in (3, 4):
        values = inputs(sample, batch)
        same(again(*values), module(*values))


@every_op
def test_inference_mode(sample: Sample) -> None:
    module, example = model(sample)
    expected = module(*example)
    with torch.inference_mode():
        actual = module(*example)
        assert all(t.is_inference() for t in tree_leaves(actual))
        same(module(*(t.clone() for t in example)), expected)


@every_op
def test_autocast_leaves_the_ops_alone(sample: Sample) -> None:
    module, example = model(sample)
    expected = module(*example)
    with torch.autocast("cpu", torch.bfloat16):
        same(module(*example), expected)


# --- the typed functions ---


WRAPPED = {
    "int8_linear": lambda x: linear.int8_linear(x, linear.int8_linear_pack(*WEIGHT), 6),
    "int8_mm": lambda x: linear.int8_mm(x.to(torch.int8), WEIGHT[0].t()),
    "linear": lambda x: linear.linear(x, linear.linear_pack(WEIGHT[0].float()), 6, "relu"),
    "conv2d": lambda x: conv.conv2d(x, conv.conv2d_pack(IMAGE_WEIGHT), 6, 3, padding=(1, 2)),
    "qconv2d": lambda x: conv.qconv2d(
        x.to(torch.uint8), conv.qconv2d_pack(IMAGE_WEIGHT.to(torch.int8), WEIGHT[1]), 6, 3, x_scale=0.1, out_scale=0.2
    ),
    "conv_bn_act": lambda x: conv.conv_bn_relu(x, IMAGE_WEIGHT, None, WEIGHT[1], WEIGHT[1], padding=(0, 1, 2, 3)),
    "quantize_per_tensor": lambda x: quantize.quantize_per_tensor(x, 0.1),
}
WEIGHT = (torch.randint(-127, 127, (6, 8), dtype=torch.int8), torch.rand(6) + 0.1)
IMAGE_WEIGHT = torch.randn(6, 8, 3, 3)


@pytest.mark.parametrize("op", WRAPPED)
def test_a_typed_function_adds_nothing_to_an_exported_program(op: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return WRAPPED[op](x)

    x = torch.rand(2, 8, 5, 8) * 100
    with torch.no_grad():
        program = torch.export.export(Model(), (x,))
        torch.testing.assert_close(program.module()(x), WRAPPED[op](x), rtol=0, atol=0)
    ours = [str(node.target) for node in program.graph.nodes if "pykernels" in str(node.target)]
    assert [name for name in ours if "_pack" not in name] == [f"pykernels.{op}.default"]
    others = {str(node.target) for node in program.graph.nodes if node.op == "call_function"} - set(ours)
    assert {name.split(".")[1] for name in others} <= {"to", "t", "permute", "_assert_tensor_metadata"}


# --- a program of many ops ---


class Program(torch.nn.Module):
    """Most ops at once, to package and compile once."""

    def __init__(self, chosen: list[Sample]) -> None:
        super().__init__()
        self.calls = torch.nn.ModuleList(model(sample)[0] for sample in chosen)

    def forward(self, *inputs: torch.Tensor) -> list[Any]:
        outputs: list[Any] = []
        position = 0
        for call in self.calls:
            count = len(call.sample.batched)
            outputs.append(call(*inputs[position : position + count]))
            position += count
        return outputs


def program() -> tuple[Program, tuple[torch.Tensor, ...]]:
    """One sample of every op."""
    chosen = list({sample.op: sample for sample in SAMPLES}.values())
    return Program(chosen), tuple(t for sample in chosen for t in inputs(sample, 3))


@pytest.mark.slow
def test_a_program_of_every_op_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    module, example = program()
    with torch.no_grad():
        same(torch.compile(module, fullgraph=True)(*example), module(*example))


@pytest.mark.slow
def test_an_aotinductor_package_of_every_op_runs(tmp_path) -> None:
    module, example = program()
    with torch.no_grad():
        exported = torch.export.export(module, example)
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "program.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        same(loaded(*example), module(*example))

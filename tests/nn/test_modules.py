"""pykernels.nn: torch's own modules in training, one kernel on packed weights in evaluation."""

from __future__ import annotations

import collections
import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pykernels.nn as pnn
from pykernels.ops.names import ACTIVATIONS


class Ops(TorchDispatchMode):
    """Notes the names of our ops that are called inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pykernels" and not func._opname.endswith("_pack"):
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def ops_of(module: nn.Module, *inputs: torch.Tensor) -> list[str]:
    """Our ops that the module calls on these inputs without gradients."""
    with torch.no_grad(), Ops() as seen:
        module(*inputs)
    return seen.names


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative error of the whole tensor."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error}"


CASES: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...], str, float]] = {
    "linear": (lambda: pnn.Linear(12, 7), nn.Linear, (3, 5, 12), "linear", 1e-5),
    "linear without bias": (lambda: pnn.Linear(12, 7, bias=False), nn.Linear, (12,), "linear", 1e-5),
    "bf16 linear": (lambda: pnn.Linear(12, 7, precision="bf16"), nn.Linear, (3, 12), "linear", 2e-2),
    "fp16 linear": (lambda: pnn.Linear(12, 7, precision="fp16"), nn.Linear, (3, 12), "linear", 3e-3),
    "int8 linear": (lambda: pnn.Int8Linear(32, 7), nn.Linear, (3, 32), "int8_linear", 3e-2),
    "int8 linear, static": (
        lambda: pnn.Int8Linear(32, 7, x_scale=8 / 255, x_zero_point=128), nn.Linear, (3, 32), "int8_linear", 3e-2,
    ),
    "conv": (lambda: pnn.Conv2d(6, 8, 3, padding=1, stride=2), nn.Conv2d, (2, 6, 9, 7), "conv2d", 1e-5),
    "conv, same": (lambda: pnn.Conv2d(6, 8, (4, 2), padding="same"), nn.Conv2d, (2, 6, 9, 7), "conv2d", 1e-5),
    "depthwise conv": (lambda: pnn.Conv2d(6, 6, 3, groups=6, dilation=2), nn.Conv2d, (2, 6, 9, 7), "conv2d", 1e-5),
    "bf16 conv": (lambda: pnn.Conv2d(6, 8, 3, precision="bf16"), nn.Conv2d, (2, 6, 9, 7), "conv2d", 2e-2),
    "fp16 conv": (lambda: pnn.Conv2d(6, 8, 3, precision="fp16"), nn.Conv2d, (2, 6, 9, 7), "conv2d", 3e-3),
    "int8 conv": (
        lambda: pnn.Int8Conv2d(6, 8, 3, x_scale=8 / 255, x_zero_point=128), nn.Conv2d, (2, 6, 9, 7), "qconv2d", 4e-2,
    ),
    "conv in one dimension": (lambda: pnn.Conv1d(6, 8, 3, padding=2), nn.Conv1d, (2, 6, 11), "conv2d", 1e-5),
    "int8 conv in one dimension": (
        lambda: pnn.Int8Conv1d(6, 8, 3, x_scale=8 / 255, x_zero_point=128), nn.Conv1d, (2, 6, 11), "qconv2d", 4e-2,
    ),
    "max pool": (lambda: pnn.MaxPool2d(3, 2, 1), nn.MaxPool2d, (2, 6, 9, 7), "max_pool2d", 0),
    "average pool": (
        lambda: pnn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d, (2, 6, 9, 7), "avg_pool2d", 1e-5,
    ),
    "global pool": (lambda: pnn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d, (2, 6, 9, 7), "adaptive_avg_pool2d", 1e-5),
    "max pool, empty stride": (lambda: pnn.MaxPool2d(2, ()), nn.MaxPool2d, (2, 6, 9, 7), "max_pool2d", 0),
    "average pool, empty stride": (lambda: pnn.AvgPool2d(2, ()), nn.AvgPool2d, (2, 6, 9, 7), "avg_pool2d", 1e-5),
    "adaptive max pool": (
        lambda: pnn.AdaptiveMaxPool2d((None, 3)), nn.AdaptiveMaxPool2d, (2, 6, 9, 7), "adaptive_max_pool2d", 0,
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest):
    make, original, shape, op, tolerance = CASES[request.param]
    return make(), original, torch.randn(shape).clamp(-4, 3.9), op, tolerance


def test_evaluation_runs_the_kernel_and_training_runs_torch(case) -> None:
    module, original, x, op, tolerance = case
    with torch.no_grad():
        expected = original.forward(module, x)
        assert ops_of(module.train(), x) == []
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
        assert op in ops_of(module.eval(), x)
        close(module(x), expected, tolerance)


def test_a_module_is_still_one_of_torch(case) -> None:
    module, original, *_ = case
    assert isinstance(module, original)
    assert module.original is original
    assert all(not name.startswith("packed") for name in module.state_dict())
    assert all(buffer.dtype.is_floating_point for buffer in module.buffers())


def test_copies_and_pickles_compute_the_same(case) -> None:
    module, _, x, *_ = case
    module.eval()
    with torch.no_grad():
        expected = module(x)
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
            torch.testing.assert_close(again(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_of_16_bit_floats_stay_that(case, dtype: torch.dtype) -> None:
    module, original, x, op, tolerance = case
    module.eval().to(dtype)
    with torch.no_grad():
        expected = original.forward(module.float(), x)
        module.to(dtype)
        y = module(x.to(dtype))
        assert y.dtype == dtype
        close(y.float(), expected, max(tolerance, 2e-2) * 1.5)
        assert op in ops_of(module, x.to(dtype))


def test_other_dtypes_run_in_torch(case) -> None:
    module, original, x, *_ = case
    module.eval().double()
    assert ops_of(module, x.double()) == []
    with torch.no_grad():
        torch.testing.assert_close(module(x.double()), original.forward(module, x.double()), rtol=0, atol=0)


def test_under_autocast_layers_with_weights_run_in_torch(case) -> None:
    module, original, x, *_ = case
    module.eval()
    if not hasattr(module, "weight"):
        return
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ops_of(module, x) == []
        torch.testing.assert_close(module(x), original.forward(module, x), rtol=0, atol=0)


def test_gradients_in_evaluation_are_those_of_torch(case) -> None:
    module, original, x, _, tolerance = case
    module.eval()
    x.requires_grad_()
    leaves = [x, *module.parameters()]
    expected = original.forward(module, x)
    upstream = torch.randn_like(expected)
    close(module(x).detach(), expected.detach(), tolerance)
    for a, b in zip(
        torch.autograd.grad(module(x), leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_second_derivatives_in_evaluation() -> None:
    module = pnn.Linear(4, 3).eval()
    x = torch.randn(2, 4, requires_grad=True)

    def penalty(y: torch.Tensor) -> list[torch.Tensor]:
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), [x, module.weight]))

    for a, b in zip(penalty(module(x)), penalty(nn.Linear.forward(module, x)), strict=True):
        torch.testing.assert_close(a, b)


def test_functional_transforms_see_torch() -> None:
    module = pnn.Conv2d(3, 4, 3).eval()
    x = torch.randn(2, 3, 5, 5)
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(p):
        return torch.func.functional_call(module, p, (x,)).square().sum()

    gradient = torch.func.grad(loss)(parameters)["weight"]
    expected = torch.autograd.grad(nn.Conv2d.forward(module, x).square().sum(), module.weight)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_functional_call_uses_the_weights_it_is_given() -> None:
    module = pnn.Linear(4, 3).eval()
    x, other = torch.randn(2, 4), {"weight": torch.randn(3, 4), "bias": torch.zeros(3)}
    with torch.no_grad():
        before = module(x)
        torch.testing.assert_close(torch.func.functional_call(module, other, (x,)), x @ other["weight"].T)
        torch.testing.assert_close(module(x), before, rtol=0, atol=0)


# --- the packed weights follow the parameters ---


def change_in_place(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight.mul_(2)


def replace_data(module: nn.Linear) -> None:
    module.weight.data = torch.randn(3, 4)


def replace_data_twice(module: nn.Linear) -> None:
    for _ in range(8):  # an allocator likes to hand out the address that was freed last
        module.weight.data = torch.randn(3, 4)


def replace_parameter(module: nn.Linear) -> None:
    module.weight = nn.Parameter(torch.randn(3, 4))


def drop_bias(module: nn.Linear) -> None:
    module.bias = None


def load(module: nn.Linear) -> None:
    module.load_state_dict({"weight": torch.randn(3, 4), "bias": torch.randn(3)})


def load_by_assignment(module: nn.Linear) -> None:
    module.load_state_dict({"weight": torch.randn(3, 4), "bias": torch.randn(3)}, assign=True)


def edit_behind_autograd(module: nn.Linear) -> None:
    module.weight.data.mul_(3)  # bumps no version: seen at the next eval()
    module.eval()


def step(optimizer: Callable) -> Callable[[nn.Linear], None]:
    def run(module: nn.Linear) -> None:
        module(torch.randn(2, 4)).sum().backward()
        optimizer(module.parameters()).step()

    return run


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        replace_data,
        replace_data_twice,
        replace_parameter,
        drop_bias,
        load,
        load_by_assignment,
        edit_behind_autograd,
        pytest.param(step(lambda p: torch.optim.SGD(p, lr=0.5)), id="sgd"),
        pytest.param(step(lambda p: torch.optim.SGD(p, lr=0.5, foreach=True)), id="sgd_foreach"),
        pytest.param(step(lambda p: torch.optim.AdamW(p, lr=0.5, fused=True)), id="adamw_fused"),
    ],
)
def test_changed_weights_are_packed_again(change: Callable[[nn.Linear], None]) -> None:
    module, x = pnn.Linear(4, 3).eval(), torch.randn(2, 4)
    with torch.no_grad():
        before = module(x)
    change(module)
    with torch.no_grad():
        after = module(x)
        torch.testing.assert_close(after, nn.functional.linear(x, module.weight, module.bias))
    assert not torch.equal(before, after)
    assert ops_of(module, x) == ["linear"]


def test_unchanged_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = pnn.Linear(4, 3).eval(), torch.randn(2, 4)
    with torch.no_grad():
        module(x)
        monkeypatch.setattr(module, "pack", None)
        module(x)


class Packs:
    """Counts how often the linear layers are packed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: collections.Counter[nn.Module] = collections.Counter()
        pack = pnn.Linear.pack

        def counted(module: pnn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            self.of[module] += 1
            return pack(module, weight, bias)

        monkeypatch.setattr(pnn.Linear, "pack", counted)


def fused_step(parameters: list[nn.Parameter], gradient: float = 1.0) -> None:
    """One step of an optimizer that changes parameters without a new version."""
    for p in parameters:
        p.grad = torch.full_like(p, gradient)
    versions = [p._version for p in parameters]
    torch.optim.AdamW(parameters, lr=0.5, fused=True).step()
    assert [p._version for p in parameters] == versions


@torch.no_grad()
def test_a_step_packs_the_layers_of_its_own_parameters_only(monkeypatch: pytest.MonkeyPatch) -> None:
    packs, x = Packs(monkeypatch), torch.randn(2, 4)
    teacher, student = pnn.Linear(4, 3).eval(), pnn.Linear(4, 3).eval()
    packs.of.clear()
    for _ in range(3):
        fused_step(list(student.parameters()))
        teacher(x)
        close(student(x), nn.functional.linear(x, student.weight, student.bias))
    assert packs.of == {student: 3}
    fused_step([student.bias])  # which is packed with the weight
    close(student(x), nn.functional.linear(x, student.weight, student.bias))
    assert packs.of == {student: 4}
    fused_step([nn.Parameter(torch.randn(3))])  # in no layer of ours
    teacher(x), student(x)
    assert packs.of == {student: 4}


@torch.no_grad()
def test_a_parameter_shared_by_two_layers_is_packed_again_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    packs, x = Packs(monkeypatch), torch.randn(2, 4)
    first, second = pnn.Linear(4, 3), pnn.Linear(4, 3)
    second.weight = first.weight
    for module in (first.eval(), second.eval()):
        module(x)
    packs.of.clear()
    fused_step([first.weight])
    for module in (first, second, second, first):
        close(module(x), nn.functional.linear(x, module.weight, module.bias))
    assert packs.of == {first: 1, second: 1}


@torch.no_grad()
def test_a_step_on_a_parameter_frozen_meanwhile_is_noticed() -> None:
    module, x = pnn.Linear(4, 3).eval(), torch.randn(2, 4)
    module(x)
    module.requires_grad_(False)
    module(x)
    fused_step(list(module.parameters()))
    close(module(x), nn.functional.linear(x, module.weight, module.bias))


@torch.no_grad()
def test_a_step_on_a_subclass_is_taken_for_one_on_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shard(nn.Parameter):
        """Stands for a part of parameters that are whole elsewhere, as those of FSDP do."""

    packs, x = Packs(monkeypatch), torch.randn(2, 4)
    module = pnn.Linear(4, 3).eval()
    module(x)
    packs.of.clear()
    fused_step([Shard(torch.randn(3))])
    module(x)
    assert packs.of == {module: 1}


@torch.no_grad()
def test_packing_keeps_no_parameter_alive_and_none_from_being_swapped() -> None:
    module, x = pnn.Linear(4, 3).eval(), torch.randn(2, 4)
    module(x)
    torch.utils.swap_tensors(module.weight, nn.Parameter(torch.randn(3, 4)))
    close(module(x), nn.functional.linear(x, module.weight, module.bias))
    gone = weakref.ref(module.weight)
    module.weight = nn.Parameter(torch.randn(3, 4))
    gc.collect()
    assert gone() is None
    close(module(x), nn.functional.linear(x, module.weight, module.bias))


@torch.no_grad()
def test_a_parameter_in_place_of_another_on_its_memory_is_noticed() -> None:
    module, x = pnn.Linear(4, 3).eval(), torch.randn(2, 4)
    module(x)
    module.weight.mul_(2)
    module.weight = nn.Parameter(module.weight.data)  # same address, same stride, and its version is 0 again
    close(module(x), nn.functional.linear(x, module.weight, module.bias))


@torch.no_grad()
def test_copies_follow_their_own_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    packs, x = Packs(monkeypatch), torch.randn(2, 4)
    module = pnn.Linear(4, 3).eval()
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for each in (module, *copies):
        each(x)
    packs.of.clear()
    for each in copies:
        fused_step(list(each.parameters()))
        for other in (module, *copies):
            close(other(x), nn.functional.linear(x, other.weight, other.bias))
    assert packs.of == {each: 1 for each in copies}


@torch.no_grad()
def test_a_compiled_step_is_noticed() -> None:
    module, x = pnn.Linear(4, 3).eval(), torch.randn(2, 4)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(2):
        module(x)
        torch.compile(optimizer.step, backend="eager")()
        close(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_weights_made_in_inference_mode_are_never_stale() -> None:
    with torch.inference_mode():
        module, x = pnn.Linear(4, 3).eval(), torch.randn(2, 4)
        module(x)
        module.weight.mul_(2)
        torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_a_first_call_in_inference_mode_leaves_no_inference_tensors() -> None:
    module, x = pnn.Linear(4, 3), torch.randn(2, 4)
    module.eval()
    module.packed = None
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(module(x), module.bias.expand(2, 3))


def test_meta_and_back() -> None:
    module = pnn.Linear(4, 3).eval().to("meta")
    assert module.packed is None
    assert module(torch.randn(2, 4, device="meta")).device.type == "meta"
    module.to_empty(device="cpu")
    load(module)
    assert ops_of(module, torch.randn(2, 4)) == ["linear"]


# --- ConvBNReLU ---


def trained(activation: str = "relu", precision: str = "fp32") -> pnn.ConvBNReLU:
    """A block whose statistics are not the trivial ones."""
    block = pnn.ConvBNReLU(5, 8, 3, activation=activation, precision=precision)
    with torch.no_grad():
        block.bn.weight.uniform_(0.5, 2)
        block.bn.bias.normal_()
    for _ in range(3):
        block(torch.randn(4, 5, 9, 9) * 2 + 1)
    return block


def unfused(block: pnn.ConvBNReLU, x: torch.Tensor) -> torch.Tensor:
    y = nn.BatchNorm2d.forward(block.bn, nn.Conv2d.forward(block.conv, x))
    return y if isinstance(block.act, nn.Identity) else block.act.plain(y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_block_is_one_call_in_evaluation(activation: str) -> None:
    block, x = trained(activation).eval(), torch.randn(2, 5, 9, 9)
    assert ops_of(block, x) == ["conv2d"]
    with torch.no_grad():
        close(block(x), unfused(block, x))


def test_a_block_trains_as_torch_does() -> None:
    ours = pnn.ConvBNReLU(5, 8, 3)
    theirs = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), copy.deepcopy(ours.state_dict()).values(), strict=True)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, theirs)]
    for _ in range(4):
        x = torch.randn(4, 5, 9, 9)
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        with torch.no_grad():
            close(ours.eval()(x), theirs.eval()(x))
        ours.train(), theirs.train()


def test_statistics_that_move_are_folded_again() -> None:
    block, x = trained().eval(), torch.randn(2, 5, 9, 9)
    with torch.no_grad():
        block(x)
        block.bn.train()(torch.randn(8, 8, 5, 5) * 7 + 3)  # only the statistics change
        block.bn.eval()
        close(block(x), unfused(block, x))
        block.bn.running_mean.add_(1)
        close(block(x), unfused(block, x))


def test_frozen_statistics_in_training_run_in_torch() -> None:
    block, x = trained(), torch.randn(2, 5, 9, 9)
    block.bn.eval()
    assert ops_of(block, x) == []
    with torch.no_grad():
        torch.testing.assert_close(block(x), unfused(block, x), rtol=0, atol=0)


@pytest.mark.parametrize("needs", ["x", "conv.weight", "bn.weight", "bn.bias", "everything"])
def test_gradients_of_a_block_in_evaluation(needs: str) -> None:
    block, x = trained("silu").eval(), torch.randn(2, 5, 9, 9)
    leaves = {"x": x, **dict(block.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(needs in (name, "everything"))
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    actual, expected = block(x), unfused(block, x)
    close(actual.detach(), expected.detach())
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["conv", "bn", "act"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_hook_sees_what_it_would_have_seen(where: str, kind: str) -> None:
    block, x = trained().eval(), torch.randn(2, 5, 9, 9)
    plain = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), block.state_dict().values(), strict=True)))
    seen: list[list[torch.Tensor]] = []
    for module, index in ((block, where), (plain, {"conv": "0", "bn": "1", "act": "2"}[where])):
        values: list[torch.Tensor] = []
        seen.append(values)

        def hook(_, *rest, values=values) -> None:
            for item in rest:
                values.extend(
                    t.detach().clone() for t in (item if isinstance(item, tuple) else (item,)) if t is not None
                )

        handle = getattr(module.get_submodule(index), f"register_{kind}_hook")(hook)
        module(x).square().sum().backward()
        handle.remove()
    assert len(seen[0]) == len(seen[1]) > 0
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert ops_of(block, x) == ["conv2d"]  # fused again once the hook is gone


def test_old_checkpoints_load() -> None:
    block, other = trained().eval(), trained()
    x = torch.randn(2, 5, 9, 9)
    with torch.no_grad():
        block(x)
        block.load_state_dict(other.state_dict())
        close(block(x), other.eval()(x), 0)


@pytest.mark.parametrize("make", [lambda: trained().eval(), lambda: pnn.Int8Linear(9, 4).eval()], ids=["block", "int8"])
def test_a_module_compiles_to_one_graph_with_the_op_in_it(make) -> None:
    module = make()
    x = torch.randn(2, 5, 9, 9)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(targets) == 1 and targets[0].startswith("pykernels.")


def test_a_compiled_module_sees_renewed_weights() -> None:
    module, x = pnn.Linear(4, 3).eval(), torch.randn(2, 4)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        load(module)
        torch.testing.assert_close(compiled(x), nn.functional.linear(x, module.weight, module.bias))


def test_a_compiled_module_has_gradients() -> None:
    block, x = trained().eval(), torch.randn(2, 5, 9, 9, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(x).square().sum(), [x, block.conv.weight])
    expected = torch.autograd.grad(unfused(block, x).square().sum(), [x, block.conv.weight])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_holds_the_op(strict: bool) -> None:
    block, x = trained().eval(), torch.randn(2, 5, 9, 9)
    program = torch.export.export(block, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["pykernels.conv2d.default"]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), block(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pnn.Linear(4, 3, precision="fp8"), "precision must be one of fp32, bf16"),
        (lambda: pnn.Conv2d(4, 3, 1, padding_mode="reflect"), "padding_mode must be 'zeros'"),
        (lambda: pnn.ConvBNReLU(4, 3, 1, activation="swish"), "activation must be one of none, relu"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

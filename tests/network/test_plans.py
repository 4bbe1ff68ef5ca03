"""Plans: a network, or a part of it, as one call, with the bits of the graph of ops."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import pykernels as pk
from pykernels.bench import zoo
from pykernels.network.plan import tune
from pykernels.network.plan.format import UNTUNED, decode, hash_of
from tests.models import ZOO

PRECISIONS = ("fp32", "bf16", "int8")


def optimized(model: nn.Module, *inputs: torch.Tensor, precision: str = "fp32", **options: Any) -> pk.Optimized:
    calibration = [inputs] if precision == "int8" else None
    return pk.optimize(model.eval(), inputs, precision, calibration, **options)


def plans(fast: pk.Optimized) -> int:
    """How many calls of plans a call of the network makes; that there are none is a failure."""
    assert fast.planned is not None
    return len(fast.planned.labels)


def calls(fast: pk.Optimized) -> list[str]:
    """What is torch's between the plans."""
    assert fast.planned is not None
    targets = [str(node.target) for node in fast.planned.program.graph.nodes if node.op == "call_function"]
    return [
        target for target in targets if "run_plan" not in target and "getitem" not in target and "sym" not in target
    ]


@torch.no_grad()
def same(fast: pk.Optimized, *inputs: torch.Tensor) -> None:
    """The plans' answers are those of the graph of ops, and lie in memory as these do."""
    assert fast.planned is not None
    for planned, expected in zip(fast.planned.program(*inputs), fast.program(*inputs), strict=True):
        assert planned.dtype == expected.dtype
        assert torch.equal(planned, expected)


class Small(nn.Module):
    """A bit of everything that plans do: strides, depthwise, squeeze and excitation, residual, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.wide = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = F.hardswish(self.wide(x))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.point(y) + x)
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x, 2)], 1)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.fixture(scope="module")
def small() -> pk.Optimized:
    torch.manual_seed(0)
    return optimized(Small(), torch.randn(2, 3, 20, 20))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def network(name: str, precision: str) -> tuple[pk.Optimized, torch.Tensor]:
    build, size = ZOO[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    return optimized(zoo.settle(build(), x), x, precision=precision), x


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, precision) for name in ("mobilenet_v3_small", "shufflenet_v2_x0_5") for precision in PRECISIONS),
        *(("squeezenet1_1", precision) for precision in PRECISIONS),
        ("resnet18", "fp32"),
        ("densenet121", "fp32"),
    ],
)
def test_a_network_is_one_plan_with_the_bits_of_its_ops(name: str, precision: str, isa: str) -> None:
    fast, x = network(name, precision)
    assert plans(fast) == 1 and not calls(fast)
    same(fast, x)
    same(fast, torch.randn(1, *x.shape[1:]))
    same(fast, torch.randn(3, *x.shape[1:]).to(memory_format=torch.channels_last))


MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flatten": lambda y: y.flatten(1),
    "reshape": lambda y: y.reshape(y.shape[0], 4, -1),
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "permute and reshape": lambda y: y.permute(0, 2, 3, 1).reshape(y.shape[0], -1),
    "transpose": lambda y: y.transpose(1, 2),
    "slice": lambda y: y[:, 1:-1, ::2],
    "select": lambda y: y[:, 3],
    "the last": lambda y: y[..., -1],
    "chunk": lambda y: y.chunk(3, 1)[1],
    "split": lambda y: torch.cat(y.split([3, 5], 1)[::-1], 1),
    "expand": lambda y: y[:, :, :1, :1].expand(-1, -1, 4, 5),
    "pad": lambda y: F.pad(y, (1, 2, 0, 1)),
    "pad with a number": lambda y: F.pad(y, (1, 0), value=0.5),
    "squeeze": lambda y: F.adaptive_avg_pool2d(y, (1, 3)).squeeze(2),
    "cat of contiguous": lambda y: torch.cat([y.flatten(2), y.flatten(2)], 2),
    "add": lambda y: y + y.roll(1, 1),
    "mul of an attention": lambda y: y * y.amax((2, 3), keepdim=True),
    "a number": lambda y: (y - 0.3) * 2.5 + 1,
    "one number a channel": lambda y: y * torch.linspace(0, 1, 8).view(8, 1, 1) + torch.ones(1, 8, 1, 1),
    "one number a column": lambda y: y * torch.linspace(0, 1, 7),
    "a part of itself": lambda y: y * y[:1, :1, :1, :1] + y[:, :, :1, :1],
    "clone": lambda y: y.clone().contiguous(),
    "a result twice": lambda y: torch.cat([y, y], 1),
    "what nobody else reads twice": lambda y: torch.cat([F.max_pool2d(y, 2)] * 2, 1),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("move", MOVES)
def test_what_lies_between_layers_keeps_its_bits(move: str, precision: str) -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = F.relu(self.before(x))
            return MOVES[move](y), y

    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 7)
    fast = optimized(Moved(), x, precision=precision)
    assert plans(fast) >= 1
    same(fast, x)
    same(fast, torch.randn(5, 3, 6, 7))


def test_lines_and_tokens_are_planned_too(isa: str) -> None:
    class Lines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv1d(3, 8, 5, padding=2), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(F.relu(self.conv(x)).transpose(1, 2))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 30)
    for precision in PRECISIONS:
        fast = optimized(Lines(), x, precision=precision)
        assert plans(fast) == 1
        same(fast, x)


def test_what_no_plan_can_do_stays_between_plans() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.cell, self.after = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(self.cell(F.relu(self.before(x)))[0])

    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    fast = optimized(Recurrent(), x)
    assert plans(fast) == 2
    same(fast, x)
    assert any("lstm" in left for left in fast.plan().left)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_of_any_size_and_stride(small: pk.Optimized, precision: str) -> None:
    torch.manual_seed(1)
    fast = small if precision == "fp32" else optimized(Small(), torch.randn(2, 3, 20, 20), precision=precision)
    for x in (
        torch.randn(1, 3, 20, 20),
        torch.randn(7, 3, 33, 18),  # sizes that were not free in the example are taken where every step can
        torch.randn(2, 3, 20, 20).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 40, 41)[:, :, ::2, 1:21],
        torch.randn(2, 20, 20, 3).permute(0, 3, 1, 2),
        torch.randn(2, 1, 20, 20).expand(2, 3, 20, 20),
        torch.randn(0, 3, 20, 20),
    ):
        same(fast, x)


def test_free_sizes_reach_compilers_as_expressions() -> None:
    torch.manual_seed(0)
    sizes = ({0: Dim("batch", max=64), 2: Dim("height", min=8, max=512), 3: Dim("width", min=8, max=512)},)
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 1, 1), nn.MaxPool2d(2)).eval()
    fast = pk.optimize(convolutions, (torch.randn(2, 3, 21, 18),), dynamic_shapes=sizes)
    compiled = torch.compile(fast, dynamic=True)
    program = torch.export.export(fast, (torch.randn(2, 3, 21, 18),), dynamic_shapes={"args": sizes}).module()
    with torch.no_grad():
        for shape in ((2, 3, 21, 18), (5, 3, 40, 64)):
            x = torch.randn(shape)
            expected = fast(x)
            assert torch.equal(compiled(x), expected)
            assert torch.equal(program(x), expected)


def test_compilers_get_the_graph_of_ops_for_sizes_that_were_not_free(small: pk.Optimized) -> None:
    x = torch.randn(2, 3, 28, 30)
    with torch.no_grad():
        assert torch.equal(torch.compile(small)(x), small.program(x)[0])


def test_the_number_of_threads_changes_no_bit(small: pk.Optimized, threads: None) -> None:
    x = torch.randn(3, 3, 40, 40)
    answers = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        answers.append(small(x))
        assert small.plan((x,)).threads == count
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_threads_share_a_network(small: pk.Optimized) -> None:
    inputs = [torch.randn(n, 3, 20, 20) for n in range(1, 6)]
    with torch.no_grad():
        expected = [small.program(x)[0] for x in inputs]
    wrong: list[int] = []

    def run(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(100):
            i = order.randrange(len(inputs))
            if not torch.equal(small(inputs[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_child_of_a_fork_runs_it_too(small: pk.Optimized) -> None:
    x = torch.randn(2, 3, 20, 20)
    expected = small(x)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork leaves OpenMP's threads behind: torch's own rule
        os._exit(0 if torch.equal(small(x), expected) else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0


def test_more_kinds_of_shapes_than_are_kept_are_made_ready_again(small: pk.Optimized) -> None:
    inputs = [torch.randn(1, 3, 20, 20 + i) for i in range(20)]
    for _ in range(2):
        for x in inputs:
            same(small, x)


STEADY = """
import gc, resource, sys, torch, pykernels as pk
fast, x = pk.load(sys.argv[1]), torch.randn(2, 3, 64, 64)
with torch.inference_mode():
    for _ in range(20):
        fast(x)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(500):
        fast(x)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_no_page_is_touched_for_the_first_time_in_the_steady_state(small: pk.Optimized, tmp_path: Path) -> None:
    small.save(tmp_path / "net.pk")
    found = subprocess.run([sys.executable, "-c", STEADY, tmp_path / "net.pk"], stdout=-1, text=True, check=True)
    assert int(found.stdout) < 50  # of 500 calls: a kernel may take pages away meanwhile


def test_memory_between_the_steps_is_little_more_than_what_lives_at_once() -> None:
    for name in ("resnet18", "densenet121", "mobilenet_v3_small"):
        found = network(name, "fp32")[0].plan()
        assert 0 < found.least_arena_bytes <= found.arena_bytes <= 1.2 * found.least_arena_bytes


def test_copies_have_weights_of_their_own(small: pk.Optimized) -> None:
    x = torch.randn(2, 3, 20, 20)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), copy.deepcopy(small).to("cpu")):
        assert other.planned is not None and small.planned is not None
        assert other.planned.weights.data_ptr() != small.planned.weights.data_ptr()
        assert torch.equal(other(x), small(x))


def test_the_report_of_a_plan_names_layers_kernels_and_memory(small: pk.Optimized) -> None:
    found = small.plan(rounds=3)
    assert [row.kernel for row in found.rows if row.step.startswith("wide")] == ["depthwise convolution"]
    stem = next(row for row in found.rows if row.step.startswith("stem") and row.operations)
    assert (stem.shape, stem.operations) == ((2, 16, 10, 10), 2 * 2 * 16 * 100 * 27)
    assert found.seconds is not None and all(row.seconds is not None for row in found.rows)
    text = str(found)
    assert "stem: conv2d + relu" in text and "MB" in text
    assert small.plan((torch.randn(9, 3, 20, 20),)).rows[-1].shape == (9, 5)


def test_tuning_changes_how_layers_are_cut_and_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 40)
    fast = optimized(Small(), x)
    expected, seen = fast(x), []
    monkeypatch.setattr(tune, "_GAIN", 1e9)  # take the best in any case
    monkeypatch.setattr(tune, "_GAIN_OF_ALL", 1e9)
    fast.tune(rounds=2, progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert fast.planned is not None
    found = decode(fast.planned.program.plan_1)
    assert found.threads == torch.get_num_threads() and found.isa > 0
    assert any(tuple(r.numbers[-3:]) != UNTUNED for r in found.records if r.kind == "conv2d")
    assert seen[0] == ("tuning", 0, 3) and seen[-1] == ("tuning", 3, 3)
    fast.save(tmp_path / "net.pk")
    for other in (fast, pk.load(tmp_path / "net.pk")):
        assert torch.equal(other(x), expected)
        assert torch.equal(other(torch.randn(1, 3, 28, 28) * 0 + 1), fast.program(torch.ones(1, 3, 28, 28))[0])


def test_wrong_inputs_are_refused_by_name(small: pk.Optimized) -> None:
    for x, message in (
        (torch.randn(2, 4, 20, 20), "x has 4 channels, but packed was made for 3"),
        (torch.randn(2, 3, 20, 20).double(), "inputs must not be float64"),
        (torch.randn(2, 3, 20, 20).half(), r"inputs\[0\] must be float32, not float16"),
        (torch.randn(3, 20, 20), r"inputs\[0\] must have 4 dimensions"),
        (torch.randn(2, 3, 20, 0), "smaller than kernel_size"),
    ):
        with pytest.raises(RuntimeError, match=message):
            small(x)
    same(small, torch.randn(2, 3, 20, 20))


def changed(plan: torch.Tensor, place: int, word: int) -> torch.Tensor:
    """A plan with another word, and the hash of that."""
    words = list(struct.unpack(f"<{plan.numel() // 8}Q", bytes(plan.tolist())))
    words[place] = word % 2**64
    words[3] = hash_of(struct.pack(f"<{len(words) - 4}Q", *words[4:]))
    return torch.frombuffer(bytearray(struct.pack(f"<{len(words)}Q", *words)), dtype=torch.uint8)


class Woven(nn.Module):
    """Random steps over values of one shape, each read by any later step. Many could be written where an operand lies:
    sums and residuals of a value with itself, of views of one memory, of what is an output or read again. Averages tell
    where values lie otherwise than in the graph of ops: their sums are then rounded otherwise."""

    STEPS = 14

    def __init__(self, seed: int) -> None:
        super().__init__()
        chosen = random.Random(seed)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, *chosen.choice([(1,), (3, 1, 1)])) for _ in range(3))
        self.wide = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.seed = seed

    def step(self, chosen: random.Random, values: list[torch.Tensor]) -> torch.Tensor:
        u, v = (chosen.choice(values[-4:] if chosen.random() < 0.7 else values) for _ in range(2))
        u = v if chosen.random() < 0.2 else u
        conv = chosen.choice([*self.convs, self.wide])
        steps: list[Callable[[], torch.Tensor]] = [
            lambda: conv(u),
            lambda: F.relu(conv(u) + v),
            lambda: v + F.relu(conv(u)),
            lambda: u + v,
            lambda: F.relu(u + v),
            lambda: u * v,
            lambda: u * F.max_pool2d(v, 6),
            lambda: u * F.adaptive_avg_pool2d(v, 1),
            lambda: F.avg_pool2d(u, 3, 1, 1),
            lambda: u * v[:, :, 2:3, 4:5],
            lambda: torch.cat([u[:, 5:], v[:, :5]], 1),
            lambda: torch.cat([u, v], 1)[:, 3:11],
            lambda: u.permute(0, 1, 3, 2),
            lambda: u.reshape(u.shape[0], 2, 4, 36).transpose(1, 2).reshape(u.shape),
            lambda: u[:, :, :1].expand(-1, -1, 6, -1),
            lambda: F.pad(u[:, :, 1:, :-1], (1, 0, 0, 1)),
            lambda: F.max_pool2d(u, 3, 1, 1),
        ]
        return chosen.choice(steps)()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chosen = random.Random(self.seed)
        values = [x, self.convs[0](x)]
        for _ in range(self.STEPS):
            values.append(self.step(chosen, values))
        return values[-1], *chosen.sample(values[1:-1], chosen.randrange(3))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in range(10, 60, 10))])
def test_what_is_written_where_an_operand_lay_is_read_by_nobody_else(first: int, precision: str) -> None:
    for seed in range(first, first + 10):
        torch.manual_seed(seed)
        x = torch.randn(2, 8, 6, 6)
        fast = optimized(Woven(seed), x, precision=precision)
        assert plans(fast) >= 1
        same(fast, x)
        same(fast, torch.randn(3, 8, 6, 6))
        # In the other memory format what torch reads between plans may lie otherwise, and averages differ in last bits.
        other = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
        with torch.no_grad():
            torch.testing.assert_close(fast(other), fast.program(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_damaged_plan_is_refused_or_harmless(precision: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 12, 12)
    fast = optimized(Small(), x, precision=precision)
    assert fast.planned is not None
    plan, weights = fast.planned.program.plan_1, fast.planned.weights
    run = torch.ops.pykernels.run_plan
    chosen = random.Random(0)
    refused = 0
    for place in range(4, plan.numel() // 8):
        for word in (0, 1, -1, 7, 2**62, -(2**63), chosen.getrandbits(64), chosen.randrange(300)):
            try:
                run(changed(plan, place, word), weights, [x], [], [], [], [])
            except RuntimeError:
                refused += 1
    assert refused > plan.numel() // 8
    for cut in range(0, plan.numel(), 8):
        with pytest.raises(RuntimeError, match="run_plan: plan is"):
            run(plan[:cut].clone(), weights, [x], [], [], [], [])
    damaged = plan.clone()
    damaged[40] ^= 1
    with pytest.raises(RuntimeError, match="run_plan: plan is damaged"):
        run(damaged, weights.clone(), [x], [], [], [], [])  # what was made ready over `weights` is known by its hash
    with pytest.raises(RuntimeError, match="run_plan: weights has 64 bytes"):
        run(plan, weights[:64].clone(), [x], [], [], [], [])
    for place in range(0, weights.numel(), 97):  # headers of packed weights among them
        other = weights.clone()
        other[place] ^= 0x41
        with contextlib.suppress(RuntimeError):
            run(plan, other, [x], [], [], [], [])

"""Saved networks: one mapped file, no Python class needed, nothing in it executed, and nothing else taken for one.

What happens to thousands of damaged files is in fuzz_file.py.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Function, Mixed, lively
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import pykernels as pk
from pykernels.network.saved import file
from tests.network.fuzz_file import Parts

X = (3, 12, 12)
Pair = namedtuple("Pair", "first second")
pytree._register_namedtuple(Pair, serialized_type_name="test_save.Pair")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, pk.Optimized]:
    fast = pk.optimize(lively(Mixed(), *X), torch.randn(2, *X))
    path = tmp_path_factory.mktemp("saved") / "net.pk"
    fast.save(path)
    return path, fast


def again(fast: pk.Optimized, folder: Path) -> pk.Optimized:
    fast.save(folder / "again.pk")
    return pk.load(folder / "again.pk")


# --- what is kept ---


@pytest.mark.parametrize("batch", [1, 3])
def test_a_loaded_network_answers_to_the_bit_for_any_batch(saved, batch) -> None:
    path, fast = saved
    loaded, x = pk.load(path), torch.randn(batch, *X)
    assert torch.equal(loaded(x), fast(x))
    assert loaded.report() == fast.report() and loaded.dynamic and loaded.free == fast.free


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_every_precision_is_kept_to_the_bit(precision: str, tmp_path) -> None:
    x = torch.randn(2, *X)
    fast = pk.optimize(lively(Mixed(), *X), x, precision, [x] if precision == "int8" else None)
    assert torch.equal(again(fast, tmp_path)(x), fast(x))


def test_loading_needs_no_class_of_the_model(saved) -> None:
    path, fast = saved
    code = f"import torch, pykernels as pk; print(pk.load({str(path)!r})(torch.ones(2, 3, 12, 12)).sum().item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(fast(torch.ones(2, *X)).sum().item(), rel=1e-6)


def test_a_loaded_network_is_saved_as_the_same_bytes(saved, tmp_path) -> None:
    path, fast = saved
    pk.load(path).save(tmp_path / "again.pk")
    assert (tmp_path / "again.pk").read_bytes() == path.read_bytes()
    fast.save(tmp_path / "again.pk")
    assert (tmp_path / "again.pk").read_bytes() == path.read_bytes()


def test_arguments_of_every_kind_are_kept(tmp_path) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.masked_fill(x > 0, float("-inf")).to(torch.float64, memory_format=torch.channels_last)
        z = torch.zeros(2, 3, dtype=torch.int32, device="cpu") + torch.arange(3)
        return y, z, x[:, 1:, ::2].nan_to_num(float("nan")), torch.view_as_complex(x.view(2, -1, 2)) * (1 + 2j)

    fast, x = (
        pk.optimize(Function(forward).eval(), torch.randn(2, 3, 4, 4), dynamic_batch=False),
        torch.randn(2, 3, 4, 4),
    )
    for loaded, expected in zip(again(fast, tmp_path)(x), fast(x), strict=True):
        assert torch.equal(loaded, expected) and loaded.stride() == expected.stride()


@pytest.mark.parametrize(
    "nested",
    [
        lambda y: [y, (y, {"a": y, 3: [y]})],
        lambda y: OrderedDict(b=y, a=y),
        lambda y: Pair(y, {}),
        lambda y: defaultdict(list, {"a": y}),
    ],
)
def test_outputs_stay_nested_as_they_were(nested: Callable[[torch.Tensor], Any], tmp_path) -> None:
    fast = pk.optimize(Function(lambda m, x: nested(m.conv(x)), conv=nn.Conv2d(3, 4, 1)), torch.randn(2, *X))
    x = torch.randn(3, *X)
    loaded, expected = again(fast, tmp_path)(x), fast(x)
    assert pytree.tree_structure(loaded) == pytree.tree_structure(expected)
    assert type(loaded) is type(expected)


def test_attention_recurrence_and_regions_are_kept(tmp_path) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y, _ = m.lstm(x)
        y = y.unflatten(2, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y)
        return torch.cond(y.sum() > 0, lambda y: y.cos(), lambda y: y.sin(), (y,))

    fast = pk.optimize(Function(forward, lstm=nn.LSTM(6, 8, batch_first=True)).eval(), torch.randn(2, 5, 6))
    loaded, x = again(fast, tmp_path), torch.randn(3, 5, 6)
    for input_ in (x, -x):
        torch.testing.assert_close(loaded(input_), fast(input_))
    assert torch.equal(again(loaded, tmp_path)(x), loaded(x))


def test_an_optimized_network_exports_and_compiles_as_a_whole(saved) -> None:
    path, fast = saved
    x = torch.randn(2, *X)
    for network in (fast, pk.load(path)):
        program = torch.export.export(network, (x,))
        assert torch.equal(program.module()(x), fast(x))
        assert torch.equal(torch.compile(network, fullgraph=True, backend="aot_eager")(x), fast(x))


def test_a_compiler_builds_the_graph_of_ops_of_a_loaded_network(tmp_path) -> None:
    """What was loaded has it unbuilt until it is asked for; compilers ask for it where a size was not free."""
    x = torch.randn(2, 3, 8, 8)
    fast = pk.optimize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), x)
    fast.save(tmp_path / "net.pk")
    x = torch.randn(2, 3, 9, 8)
    network = pk.load(tmp_path / "net.pk")
    assert set(network.state_dict()) == set(fast.state_dict())
    assert torch.equal(torch.compile(network, fullgraph=True, backend="aot_eager")(x), fast.program(x)[0])
    program = torch.export.export(pk.load(tmp_path / "net.pk"), (x,))
    assert torch.equal(program.module()(x), fast.program(x)[0])
    again = pickle.loads(pickle.dumps(pk.load(tmp_path / "net.pk")))
    assert torch.equal(again.program(x)[0], fast.program(x)[0])


# --- memory ---


def storages(network: pk.Optimized) -> set[int]:
    return {buffer.untyped_storage().data_ptr() for buffer in network.program.buffers()}


def test_weights_lie_in_one_storage_each_at_a_multiple_of_64_bytes(saved) -> None:
    path, fast = saved
    for network in (fast, pk.load(path), copy.deepcopy(fast)):
        assert len(storages(network)) == 1
        assert all(buffer.data_ptr() % 64 == 0 for buffer in network.program.buffers())
    assert storages(copy.deepcopy(fast)) != storages(fast)


def test_a_pickle_holds_the_weights_once(saved) -> None:
    _, fast = saved
    text, x = pickle.dumps(fast), torch.randn(2, *X)
    assert len(text) < fast.report().bytes_after + 100_000
    assert torch.equal(pickle.loads(text)(x), fast(x))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) + self.calls[0]


def test_state_is_a_process_s_own_and_the_file_is_never_changed(tmp_path) -> None:
    fast, x = pk.optimize(Counting(), torch.randn(2, 4)), torch.randn(2, 4)
    fast(x)
    fast.save(tmp_path / "net.pk")
    before = (tmp_path / "net.pk").read_bytes()
    os.chmod(tmp_path / "net.pk", 0o444)
    os.chmod(tmp_path, 0o555)
    first, second = pk.load(tmp_path / "net.pk"), pk.load(tmp_path / "net.pk")
    for _ in range(3):
        expected = fast(x)
        assert torch.equal(first(x), expected)
    assert first.program.calls.tolist() == [4] * 3 and second.program.calls.tolist() == [1] * 3
    assert (tmp_path / "net.pk").read_bytes() == before
    os.chmod(tmp_path, 0o755)


PROCESSES = """
import os, sys, torch, pykernels as pk
pipes = [os.pipe() for _ in range(4)]
done, go = os.pipe()
children = []
for _, write in pipes:
    child = os.fork()
    if not child:
        network = pk.load(sys.argv[1])
        network(torch.ones(1, 1024))
        os.write(write, b"1")
        os.close(go)
        os.read(done, 1)  # until the parent has looked
        os._exit(0)
    children.append(child)
for read, _ in pipes:
    os.read(read, 1)
for child in children:
    ours = False
    for line in open(f"/proc/{child}/smaps"):
        words = line.split()
        if not words[0].endswith(":"):
            ours = words[-1] == sys.argv[1]
        elif ours and words[0] in ("Rss:", "Pss:", "Private_Dirty:"):
            print(words[0], words[1])
os.close(go)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system does not tell what processes share")
def test_four_processes_hold_the_weights_once(tmp_path) -> None:
    path = tmp_path / "net.pk"
    pk.optimize(nn.Linear(1024, 4096), torch.ones(2, 1024)).save(path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = [sys.executable, "-c", PROCESSES, str(path)]
    told = subprocess.run(code, capture_output=True, text=True, check=True, env=environment).stdout.split()
    found: dict[str, list[int]] = {}
    for name, kilobytes in zip(told[::2], told[1::2], strict=True):
        found.setdefault(name, []).append(int(kilobytes) * 1024)
    size = path.stat().st_size
    assert len(found["Rss:"]) == 4 and min(found["Rss:"]) > 0.9 * size, "each process has all weights in memory"
    assert sum(found["Pss:"]) < 1.1 * size and not any(found["Private_Dirty:"]), "the same ones"


STARTS = """
import sys, torch, pykernels as pk
before = set(sys.modules)
pk.load(sys.argv[1])(torch.ones(1, 1024))
print(*(set(sys.modules) - before))
"""


def test_loading_and_calling_import_nothing(tmp_path) -> None:
    """Torch's compilers alone would cost a second and a hundred megabytes."""
    path = tmp_path / "net.pk"
    pk.optimize(nn.Linear(1024, 16), torch.ones(2, 1024)).save(path)
    code = [sys.executable, "-c", STARTS, str(path)]
    assert subprocess.run(code, capture_output=True, text=True, check=True).stdout.split() == []


# --- what is refused ---


def refused(path: Path, data: bytes, why: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"path: .*bad\.pk.*" + why):
        pk.load(path)


def test_a_save_that_fails_leaves_what_was_there(saved, tmp_path, monkeypatch) -> None:
    path, fast = tmp_path / "net.pk", saved[1]
    path.write_bytes(b"the network of yesterday")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        fast.save(path)
    assert path.read_bytes() == b"the network of yesterday" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda m, x: m.conv(x).to_sparse().to_dense(), r"it calls aten\.to_sparse"),
        (lambda m, x: torch.max(m.conv(x), 1), r"torch\.return_types\.max.* has no serialized_type_name"),
    ],
)
def test_what_a_file_may_not_name_is_refused_when_it_is_saved(forward, why: str, tmp_path) -> None:
    fast = pk.optimize(Function(forward, conv=nn.Conv2d(3, 4, 1)), torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match=f"the network cannot be saved: .*{why}"):
        fast.save(tmp_path / "net.pk")
    assert not list(tmp_path.iterdir())


def test_memory_that_is_not_written_holds_zeros_not_what_was_there(tmp_path) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.empty_like(x), x.new_empty(3, 4), torch.empty(5), m.conv(x)

    fast = pk.optimize(Function(forward, conv=nn.Conv2d(3, 4, 1)), torch.randn(2, 3, 4, 4), dynamic_batch=False)
    assert not any(y.any() for y in again(fast, tmp_path)(torch.randn(2, 3, 4, 4))[:3])


def test_a_truncated_altered_or_foreign_file_is_refused(saved, tmp_path) -> None:
    path, _ = saved
    data, bad = path.read_bytes(), tmp_path / "bad.pk"
    for content in (b"", b"hello", data[:63], data[: len(data) // 2], data[:-10], data + b"\0" * 64, bytes(len(data))):
        refused(bad, content, "")
    for at in (0, 9, 20, 40, 63, 64, 200, len(data) // 2, len(data) - 1):
        refused(bad, data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :], "")
    torch.save({"a": torch.ones(3)}, bad)
    refused(bad, bad.read_bytes(), "did not write it")
    refused(bad, data[:8] + b"\2" + data[9:], "its format 2 is not 3: another version of pykernels wrote it")
    with pytest.raises(FileNotFoundError):
        pk.load(tmp_path / "none.pk")


def test_what_is_no_file_of_bytes_is_refused_and_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="no regular file"):
            pk.load(path)


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def test_nothing_that_a_file_holds_is_executed(saved, tmp_path) -> None:
    """Neither pickles, nor names that are code where fx writes them into code, nor types whose import is asked for."""
    path, bad, mark = saved[0], tmp_path / "bad.pk", tmp_path / "mark"
    trap = pickle.dumps(Trap(mark))
    refused(bad, trap, "")
    torch.save(Trap(mark), bad)
    refused(bad, bad.read_bytes(), "")
    code = f"x, y=__import__('os').mkdir({str(mark)!r})"
    enum = '{"__enum__": true, "fqn": "tests.network.trap:Trap", "name": "x"}'
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda c: c["graphs"]["program"]["nodes"][0].__setitem__(1, code),
        lambda c: c["graphs"]["program"]["nodes"][1].__setitem__(2, code),
        lambda c: c["graphs"]["program"]["buffers"][0].__setitem__(0, code),
        lambda c: c["graphs"]["program"]["nodes"][-2].__setitem__(2, "os.mkdir"),
        lambda c: c["graphs"]["program"]["nodes"][-2].__setitem__(4, {code: 1}),
        lambda c: c["facts"].__setitem__("out_spec", ["collections.defaultdict", ["os.mkdir", []], []]),
        lambda c: c["facts"].__setitem__("out_spec", ["builtins.dict", enum, []]),
        lambda c: c["facts"].__setitem__("in_spec", ["collections.namedtuple", "os.mkdir", []]),
    ]
    for change in changes:
        parts = Parts(path.read_bytes())
        change(parts.content)
        refused(bad, parts.together(), "cannot be loaded")
    assert not mark.exists()


def node(number: int, part: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["graphs"]["program"]["nodes"][number].__setitem__(part, value)


def tensor(part: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["tensors"][0].__setitem__(part, value)


def fact(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["facts"].__setitem__(name, value)


DEEP = json.loads("[" * 100 + "]" * 100)
# What a hostile writer might say, with checksums that hold: the change and the reason that is given.
HOSTILE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.pop("tensors"), "it has no 'tensors'"),
    (lambda c: c.__setitem__("graphs", []), "graphs: dict is needed, not list"),
    (lambda c: c["graphs"].clear(), "it has the graphs"),
    (lambda c: c["storages"].append([2**62, 0]), r"storage \d ends beyond the file"),
    (lambda c: c["storages"][0].__setitem__(0, -64), "something other than numbers"),
    (lambda c: c["storages"][0].__setitem__(0, 64), "bytes follow|fails its checksum"),
    (tensor(0, 1), r"in storage 1 of 1|leaves its storage"),
    (tensor(1, "quint8"), "a tensor is 'quint8'"),
    (tensor(2, [2**40, 2**40]), "strides has 1 numbers, not 2"),
    (tensor(2, [2**62]), "too many elements"),
    (tensor(2, [-1]), "something other than numbers"),
    (tensor(2, [True]), "something other than numbers"),
    (tensor(3, [2**40]), "leaves its storage"),
    (tensor(4, 2**62), "leaves its storage"),
    (tensor(4, 10**30), "something other than numbers"),
    (node(0, 0, "call_module"), "'call_module'"),
    (node(0, 1, "self"), "means something else|no identifier"),
    (node(1, 1, "x"), "two nodes are named 'x'"),
    (node(1, 2, "forward"), "of its own"),
    (node(1, 2, "nothing"), "no buffer or region 'nothing'"),
    (node(2, 2, "aten.from_file.default"), "'aten.from_file.default', which is not among the operators"),
    (node(2, 2, "aten.relu.nonsense"), "not among the operators"),
    (node(2, 2, ["aten"]), "not among the operators"),
    (node(2, 3, [{"node": 2}]), "is node 2, 2 nodes stand before"),
    (node(2, 3, [{"node": -1}]), "is node -1"),
    (node(2, 3, [{"device": "cuda"}]), "a device is 'cuda'"),
    (node(2, 3, [DEEP]), "nested more than"),
    (node(2, 3, 5), "args: list is needed, not int"),
    (node(-1, 3, [{"tuple": []}]), "other inputs or outputs"),
    (lambda c: c["graphs"]["program"]["nodes"].pop(), "without an output"),
    (lambda c: c["graphs"]["program"]["nodes"].reverse(), "follow the output|looks|stand before"),
    (lambda c: c["graphs"]["program"]["buffers"].append(c["graphs"]["program"]["buffers"][0]), "as another one is"),
    (lambda c: c["graphs"]["program"]["buffers"][0].__setitem__(1, 99), "is tensor 99"),
    (fact("free", [[-1]]), "free sizes"),
    (fact("in_spec", None), "no positional and keyword ones"),
    (fact("out_spec", ["no.such.type", None, []]), "not registered"),
    (fact("out_spec", ["builtins.dict", [{"tuple": []}, 1], [None]]), "cannot be nested so"),
    (fact("out_spec", DEEP), "a type of inputs or outputs has"),
    (fact("report", "{}"), "not a report"),
    (fact("report", 5), "not a report"),
]


@pytest.mark.parametrize(("change", "why"), HOSTILE, ids=[why for _, why in HOSTILE])
def test_what_cannot_be_is_refused_by_name(change: Callable[[dict[str, Any]], Any], why: str, saved, tmp_path) -> None:
    parts = Parts(saved[0].read_bytes())
    ops = [entry[0] for entry in parts.content["graphs"]["program"]["nodes"][:3]]
    assert ops == ["placeholder", "get_attr", "call_function"], "what the changes are made for"
    change(parts.content)
    refused(tmp_path / "bad.pk", parts.together(), f".*cannot be loaded.*({why})")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"[" * 10**6, b'{"graphs": NaN}', b"\xff", b'"' + b"a" * 2**24 + b'"']
)
def test_a_description_that_is_no_json_object_is_refused(text: bytes, saved, tmp_path) -> None:
    refused(tmp_path / "bad.pk", Parts(saved[0].read_bytes()).together(text), "cannot be loaded")


def test_many_nodes_are_refused_before_they_are_compiled(saved, tmp_path) -> None:
    parts = Parts(saved[0].read_bytes())
    nodes = parts.content["graphs"]["program"]["nodes"]
    nodes[1:1] = [["placeholder", f"x{i}", None, [], {}] for i in range(70_000)]
    refused(tmp_path / "bad.pk", parts.together(), "more than 65536 nodes")


def test_truth_values_are_0_or_1(tmp_path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([True, False, True]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(self.mask, x, 0)

    pk.optimize(Masked(), torch.randn(2, 3)).save(tmp_path / "net.pk")
    parts = Parts((tmp_path / "net.pk").read_bytes())
    parts.storages[0] = b"\7" + parts.storages[0][1:]
    refused(tmp_path / "bad.pk", parts.together(), "truth values")


SHAPES = {"x": (2, 5, 6), "w_ih": (32, 6), "w_hh": (32, 8), "h": (1, 2, 8)}


@pytest.mark.parametrize(("name", "shape"), [("w_ih", (32, 2)), ("w_hh", (32, 4)), ("h", (1, 1, 8)), ("x", (2, 5, 3))])
def test_shapes_that_torch_s_lstm_would_trust_are_checked(name: str, shape: tuple[int, ...]) -> None:
    from pykernels.network.saved.checked import lstm

    def call(shapes: dict[str, tuple[int, ...]]) -> Any:
        x, *weights, h = (torch.zeros(shapes[name]) for name in SHAPES)
        return lstm(x, [h, torch.zeros(1, 2, 8)], weights, False, 1, 0.0, False, False, True)

    assert call(SHAPES)[0].shape == (2, 5, 8)
    with pytest.raises(ValueError, match="lstm: "):
        call({**SHAPES, name: shape})


def test_shapes_that_torch_s_attention_would_trust_are_checked() -> None:
    from pykernels.network.saved.checked import attention, flash_attention

    q, k, v = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4096, 8), torch.zeros(1, 2, 4, 8)
    for function in (attention, flash_attention):
        with pytest.raises(ValueError, match="attention: "):
            function(q, k, v)


# --- the container itself ---


def test_several_graphs_share_storages(tmp_path, saved) -> None:
    path, fast = saved
    program = copy.deepcopy(fast.program)
    weights = file.whole(next(program.buffers()).untyped_storage())
    root = nn.Module()
    root.register_buffer("weights", weights)
    graph = torch.fx.Graph()
    graph.output((graph.get_attr("weights"),))
    whole = torch.fx.GraphModule(root, graph)
    for loaded_from in ("as it was", "as it was loaded"):
        file.write(tmp_path / "two.pk", {"program": program, "whole": whole}, {"a": 1})
        assert (tmp_path / "two.pk").stat().st_size < path.stat().st_size + 2048, (
            f"storages are written once, {loaded_from}"
        )
        graphs, facts = file.read(tmp_path / "two.pk")
        program, whole = graphs["program"].build(), graphs["whole"].build()
        assert facts == {"a": 1} and whole.weights.numel() == whole.weights.untyped_storage().nbytes()
        places = {buffer.untyped_storage().data_ptr() for buffer in program.buffers()}
        assert places == {whole.weights.data_ptr()} and torch.equal(whole()[0], weights)

"""What a file may say: sizes that are free, weights beside it, what is refused by name, and what a stranger wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper

import pykernels as pk
from pykernels.from_onnx import load, source_of
from tests.from_onnx.onnx_models import answers, model, saved

NODE = helper.make_node
IMAGE = {"image": (np.float32, ["batch", 3, 6, 6])}


def classifier(flat: list[Any] | None = None, sizes: list[Any] | None = None) -> Any:
    """A convolution, a relu, what makes rows of it, a Gemm."""
    random = np.random.default_rng(3)
    constants = {
        "w": random.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "m": random.standard_normal((5, 64)).astype(np.float32),
        "zero": np.int64(0),
        "first": np.array([0]),
        "rest": np.array([-1]),
    }
    nodes = [
        NODE("Conv", ["image", "w"], ["c"], name="conv", kernel_shape=[3, 3]),
        NODE("Relu", ["c"], ["r"], name="relu"),
        *(flat or [NODE("Flatten", ["r"], ["f"], name="flatten")]),
        NODE("Gemm", ["f", "m"], ["y"], name="gemm", transB=1),
    ]
    return model(nodes, {"image": (np.float32, sizes or IMAGE["image"][1])}, ["y"], constants)


# x.view(x.size(0), -1), as exporters write it
BY_SIZE = [
    NODE("Shape", ["r"], ["s"]),
    NODE("Gather", ["s", "zero"], ["n"]),
    NODE("Unsqueeze", ["n", "first"], ["u"]),
    NODE("Concat", ["u", "rest"], ["wanted"], axis=0),
    NODE("Reshape", ["r", "wanted"], ["f"]),
]


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flat", [None, BY_SIZE], ids=["flatten", "by size"])
def test_a_free_batch_stays_free(flat: list[Any] | None, tmp_path: Path) -> None:
    proto = classifier(flat)
    fast = pk.optimize(saved(proto, tmp_path))
    assert fast.free == [[0]] and fast.input_names == ["image"]
    x = torch.randn(7, 3, 6, 6)
    torch.testing.assert_close(fast(x), answers(proto, x)[0], atol=1e-5, rtol=1e-5)


def test_a_batch_that_the_file_fixes_stays_fixed(tmp_path: Path) -> None:
    path = saved(classifier(sizes=[1, 3, 6, 6]), tmp_path)
    assert pk.optimize(path).free == [[]]
    with pytest.raises(
        ValueError, match=r"declares image: float32\[1, 3, 6, 6\], and it is torch.float32 of sizes \[2, "
    ):
        pk.optimize(path, torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize(
    "inputs, what",
    [
        ((torch.zeros(2, 3, 6),), r"of sizes \[2, 3, 6\]"),
        ((torch.zeros(2, 3, 6, 6).half(),), "torch.float16"),
        ((3,), "int"),
        ((), "takes image: float32"),
        ((torch.zeros(2, 3, 6, 6),) * 2, "takes image: float32"),
        ({"picture": torch.zeros(2, 3, 6, 6)}, "takes image: float32"),
    ],
)
def test_inputs_that_are_not_the_files_are_refused(inputs: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"example_inputs: .*model.onnx.*{what}"):
        pk.optimize(saved(classifier(), tmp_path), inputs)


def test_other_free_sizes_need_an_example_and_are_fixed_by_it(tmp_path: Path) -> None:
    nodes = [NODE("GlobalAveragePool", ["x"], ["y"])]
    path = saved(model(nodes, {"x": (np.float32, ["n", 3, "h", "w"])}, ["y"]), tmp_path)
    with pytest.raises(ValueError, match=r"leaves sizes free, so an example is needed: x: float32\[n, 3, h, w\]"):
        pk.optimize(path)
    assert pk.optimize(path, torch.randn(1, 3, 8, 8)).free == [[0]]
    sizes = ({d: torch.export.Dim.AUTO for d in (0, 2, 3)},)
    fast = pk.optimize(path, torch.randn(2, 3, 8, 9), dynamic_shapes=sizes)
    x = torch.randn(3, 3, 5, 4)
    torch.testing.assert_close(fast(x), x.mean((2, 3), keepdim=True))


def test_a_size_that_is_no_batch_does_not_become_one(tmp_path: Path) -> None:
    """torch.export is told of a batch by equal sizes, the file says which are one."""
    nodes = [NODE("MatMul", ["x", "table"], ["y"])]
    proto = model(nodes, {"x": (np.float32, ["n", 2]), "table": (np.float32, [2, 3])}, ["y"])
    path = saved(proto, tmp_path)
    fast = pk.optimize(path)
    assert fast.free == [[0], []]
    x, table = torch.randn(5, 2), torch.randn(2, 3)
    torch.testing.assert_close(fast(x, table), x @ table)
    with pytest.raises(
        ValueError, match=r"the batch of 2 is the size of table: float32\[2, 3\], too, which is no batch"
    ):
        pk.optimize(path, (torch.randn(2, 2), table))


def test_free_sizes_of_other_names_are_one_batch_where_they_are_equal(tmp_path: Path) -> None:
    """Exporters name each input's dimensions by themselves."""
    proto = model([NODE("Add", ["x", "z"], ["y"])], {"x": (np.float32, ["a", 2]), "z": (np.float32, ["b", 2])}, ["y"])
    fast = pk.optimize(saved(proto, tmp_path))
    assert fast.free == [[0], [0]]
    x, z = torch.randn(5, 2), torch.randn(5, 2)
    torch.testing.assert_close(fast(x, z), x + z)


def test_a_shape_that_is_made_of_the_number_of_sizes(tmp_path: Path) -> None:
    """``expand(n, -1, 4)`` as the old exporter writes it: as many ones as there are sizes, where a size is -1."""
    constants = {
        "first": np.array([0]),
        "rest": np.array([-1, 4]),
        "minus": np.int64(-1),
        "c": np.float32([[[1], [2]]]),
    }
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Gather", ["s", "first"], ["n"]),
        NODE("Concat", ["n", "rest"], ["wanted"], axis=0),
        NODE("Shape", ["wanted"], ["count"]),
        NODE("ConstantOfShape", ["count"], ["ones"], value=numpy_helper.from_array(np.array([1]))),
        NODE("Mul", ["ones", "minus"], ["all_minus"]),
        NODE("Equal", ["wanted", "all_minus"], ["kept"]),
        NODE("Where", ["kept", "ones", "wanted"], ["shape"]),
        NODE("Expand", ["c", "shape"], ["e"]),
        NODE("ConstantOfShape", ["s"], ["threes"], value=numpy_helper.from_array(np.float32([3]))),
        NODE("Mul", ["threes", "x"], ["t"]),
        NODE("Add", ["e", "t"], ["y"]),
    ]
    proto = model(nodes, {"x": (np.float32, ["n", 2, 4])}, ["y"], constants)
    fast = pk.optimize(saved(proto, tmp_path))
    assert fast.free == [[0]]
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(fast(x), answers(proto, x)[0])


def test_a_padding_whose_widths_are_computed(tmp_path: Path) -> None:
    """``F.pad(x, (1, x.size(2) % 4))`` as the old exporter writes it: zeros for the rest, pairs turned around."""
    constants = {
        "last": np.array([2]), "one": np.array([1]), "axis": np.array([0]), "six": np.int64(6), "four": np.array([4]),
        "pairs": np.array([-1, 2]), "minus": np.array([-1]), "end": np.array([-(2**63) + 1]), "first": np.int64(0),
        "zero": np.float32(0),
    }  # fmt: skip
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Gather", ["s", "last"], ["size"]),
        NODE("Mod", ["size", "four"], ["width"], fmod=0),
        NODE("Concat", ["one", "width"], ["sides"], axis=0),
        NODE("Shape", ["sides"], ["some"]),
        NODE("Gather", ["some", "first"], ["count"]),
        NODE("Sub", ["six", "count"], ["rest"]),
        NODE("Unsqueeze", ["rest", "axis"], ["more"]),
        NODE("ConstantOfShape", ["more"], ["zeros"], value=numpy_helper.from_array(np.array([0]))),
        NODE("Concat", ["sides", "zeros"], ["all"], axis=0),
        NODE("Reshape", ["all", "pairs"], ["rows"]),
        NODE("Slice", ["rows", "minus", "end", "axis", "minus"], ["turned"]),
        NODE("Transpose", ["turned"], ["columns"], perm=[1, 0]),
        NODE("Reshape", ["columns", "minus"], ["pads"]),
        NODE("Pad", ["x", "pads", "zero"], ["y"]),
    ]
    proto = model(nodes, {"x": (np.float32, ["n", 2, 3])}, ["y"], constants)
    fast = pk.optimize(saved(proto, tmp_path))
    x = torch.randn(4, 2, 3)
    assert fast.free == [[0]] and torch.equal(fast(x), torch.nn.functional.pad(x, (1, 3)))


def test_arithmetic_of_sizes(tmp_path: Path) -> None:
    """Half of the channels by their number, spread over a shape that is computed with -1 where the size is kept."""
    constants = {
        "one": np.array([1]),
        "two": np.array([2]),
        "half": np.float32(0.5),
        "minus": np.array([-1, 4, 3]),
        "ones": np.array([1, 1, 1]),
        "none": np.array([-1, -1, -1]),
        "end": np.array([4]),
        "zero": np.array([0]),
        "start": np.int64(0),
        "step": np.int64(1),
    }
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Slice", ["s", "one", "two"], ["c"]),
        NODE("Cast", ["c"], ["real"], to=TensorProto.FLOAT),
        NODE("Mul", ["real", "half"], ["less"]),
        NODE("Floor", ["less"], ["down"]),
        NODE("Cast", ["down"], ["few"], to=TensorProto.INT64),
        NODE("Slice", ["x", "zero", "few", "one"], ["part"]),
        NODE("Shape", ["part"], ["found"]),
        NODE("Equal", ["minus", "none"], ["kept"]),
        NODE("Where", ["kept", "ones", "minus"], ["shape"]),
        NODE("Mul", ["found", "shape"], ["wide"]),
        NODE("Sub", ["wide", "found"], ["rest"]),
        NODE("Add", ["rest", "found"], ["wide_again"]),
        NODE("ReduceProd", ["found"], ["count"], keepdims=0),
        NODE("Range", ["start", "count", "step"], ["numbers"]),
        NODE("Reshape", ["numbers", "found"], ["grid"]),
        NODE("Cast", ["grid"], ["values"], to=TensorProto.FLOAT),
        NODE("Add", ["values", "part"], ["sum"]),
        NODE("ConstantOfShape", ["found"], ["nothing"]),
        NODE("Add", ["sum", "nothing"], ["y"]),
        NODE("Expand", ["y", "found"], ["z"]),
        NODE("Cast", ["wide_again"], ["w"], to=TensorProto.FLOAT),
    ]
    proto = model(nodes, {"x": (np.float32, ["n", 6, 1])}, ["z", "w"], constants)
    fast = pk.optimize(saved(proto, tmp_path), torch.randn(2, 6, 1))
    assert fast.free == [[0]]
    x = torch.randn(5, 6, 1)
    found = fast(x)
    assert list(found) == ["z", "w"]
    for y, expected in zip(found.values(), answers(proto, x), strict=True):
        assert torch.equal(y, expected)


# ---- weights beside the file -----------------------------------------------------------------------------------------
def external(proto: Any, tensor: int = 0, **entries: Any) -> Any:
    """The model with the bytes of one initializer in another file."""
    found = proto.graph.initializer[tensor]
    found.ClearField("raw_data")
    found.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        found.external_data.add(key=key, value=str(value))
    return proto


def test_weights_may_lie_beside_the_file(tmp_path: Path) -> None:
    proto = classifier()
    x = torch.randn(2, 3, 6, 6)
    (expected,) = answers(proto, x)
    raw = proto.graph.initializer[0].raw_data
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_bytes(b"\0" * 6 + raw + b"\0")
    path = saved(external(proto, location="sub/weights", offset=6, length=len(raw)), tmp_path)
    torch.testing.assert_close(load(path)(x), expected)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "none", "", ".", "a/../../secret", "sub\0"])
def test_weights_elsewhere_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 432)
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink("../secret", folder / "link")
    path = saved(external(classifier(), location=location), folder)
    with pytest.raises(ValueError, match=r"model.onnx: w: its external data is .* no file in the model's folder"):
        load(path)


@pytest.mark.parametrize("entries", [{"offset": 8}, {"offset": -4}, {"length": 4}, {"length": "x"}, {"offset": 2**70}])
def test_weights_of_the_wrong_length_are_refused(entries: Any, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\0" * 432)
    with pytest.raises(ValueError, match=r"model.onnx: w: "):
        load(saved(external(classifier(), location="weights", **entries), tmp_path))


# ---- what is not understood ------------------------------------------------------------------------------------------
def test_everything_that_is_not_understood_is_named_at_once(tmp_path: Path) -> None:
    nodes = [
        NODE("Relu", ["x"], ["a"], name="fine"),
        NODE("NonZero", ["a"], ["b"], name="places"),
        NODE("Unique", ["a"], ["c"], name="first"),
        NODE("Unique", ["c"], ["d"], name="second"),
        NODE("Own", ["d"], ["e"], name="custom", domain="com.example"),
        NODE("MaxPool", ["x"], ["f", "places"], name="pool", kernel_shape=[2]),
        NODE("Cast", ["places"], ["i"], to=1),
        NODE("Reshape", ["x", "b"], ["g"], name="after"),
        NODE("Reshape", ["x", "asked"], ["h"], name="asked"),
        NODE("Add", ["e", "h"], ["y"], name="sum"),
    ]
    inputs = {"x": (np.float32, [1, 2, 4]), "asked": (np.int64, [3])}
    with pytest.raises(ValueError) as told:
        load(saved(model(nodes, inputs, ["y", "i", "g"]), tmp_path))
    assert str(told.value).endswith(
        "model.onnx: not understood: NonZero (places); Unique (first, second); com.example.Own (custom); "
        "MaxPool (pool: more than its first output is read); Reshape (asked: its shape is computed from data)"
    )


def test_a_constant_of_nothing_is_refused(tmp_path: Path) -> None:
    nodes = [NODE("Constant", [], ["c"], name="empty"), NODE("Add", ["x", "c"], ["y"])]
    with pytest.raises(ValueError, match=r"not understood: Constant \(empty: its value is not one attribute\)"):
        load(saved(model(nodes, {"x": (np.float32, [1])}, ["y"]), tmp_path))


def branches(condition: str, *outputs: str) -> Any:
    """The square of x where the condition holds, else its double, with a constant of the branch's own."""
    squared, doubled = (
        [helper.make_tensor_value_info(f"{name}{i}", 1, None) for i in range(len(outputs))] for name in "sd"
    )
    then = [NODE("Mul", ["x", "x"], [value.name]) for value in squared]
    otherwise = [NODE("Mul", ["x", "two"], [value.name]) for value in doubled]
    two = numpy_helper.from_array(np.float32(2), "two")
    return NODE(
        "If", [condition], list(outputs), name="choice",
        then_branch=helper.make_graph(then, "then", [], squared),
        else_branch=helper.make_graph(otherwise, "else", [], doubled, [two]),
    )  # fmt: skip


@pytest.mark.parametrize("holds", [True, False])
def test_a_branch_that_a_constant_chooses(holds: bool, tmp_path: Path) -> None:
    proto = model([branches("q", "y")], {"x": (np.float32, [3])}, ["y"], {"q": np.array(holds)})
    x = torch.tensor([1.0, 3.0, 5.0])
    assert torch.equal(load(saved(proto, tmp_path))(x), x * x if holds else 2 * x)


@pytest.mark.parametrize("size", [1, 4])
def test_a_branch_that_a_size_chooses(size: int, tmp_path: Path) -> None:
    """As exporters write ``squeeze`` of a dimension whose size they do not know."""
    squeezed, kept = (helper.make_tensor_value_info(name, 1, None) for name in ("s", "k"))
    choice = NODE(
        "If", ["one"], ["z"],
        then_branch=helper.make_graph([NODE("Squeeze", ["p", "axis"], ["s"])], "then", [], [squeezed]),
        else_branch=helper.make_graph([branches("one", "k")], "else", [], [kept]),
    )  # fmt: skip
    nodes = [
        NODE("Relu", ["x"], ["p"]),
        NODE("Shape", ["p"], ["sizes"]),
        NODE("Gather", ["sizes", "axis"], ["size"]),
        NODE("Equal", ["size", "unit"], ["one"]),
        choice,
        NODE("Neg", ["z"], ["y"]),
    ]
    constants = {"axis": np.array([1]), "unit": np.array([1])}
    proto = model(nodes, {"x": (np.float32, ["n", size, 3])}, ["y"], constants)
    fast = pk.optimize(saved(proto, tmp_path))
    x = torch.randn(5, size, 3)
    assert fast.free == [[0]]
    torch.testing.assert_close(fast(x), -x.relu().squeeze(1) if size == 1 else -2 * x)


@pytest.mark.parametrize("constants", [{"q": np.array(True)}, {}], ids=["constant", "size"])
def test_branches_of_other_outputs_are_refused(constants: Any, tmp_path: Path) -> None:
    choice = branches("q", "y")
    for attribute in choice.attribute:
        del attribute.g.output[:]
    sized = [NODE("Size", ["x"], ["n"]), NODE("Equal", ["n", "three"], ["q"])]
    nodes = [*([] if constants else sized), choice]
    proto = model(nodes, {"x": (np.float32, [3])}, ["y"], {"three": np.int64(3), **constants})
    with pytest.raises(ValueError, match=r"not understood: If \(choice: a branch has other outputs\)"):
        load(saved(proto, tmp_path))


def test_what_no_output_needs_need_not_be_understood(tmp_path: Path) -> None:
    nodes = [NODE("Relu", ["x"], ["y"]), NODE("NonZero", ["x"], ["places"]), NODE("Unique", ["places"], ["some"])]
    graph = load(saved(model(nodes, {"x": (np.float32, [2])}, ["y"]), tmp_path))
    assert torch.equal(graph(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))


def test_a_subgraph_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph([NODE("Relu", ["x"], ["b"])], "branch", [], [helper.make_tensor_value_info("b", 1, [2])])
    nodes = [NODE("If", ["q"], ["y"], name="choice", then_branch=branch, else_branch=branch)]
    proto = model(nodes, {"x": (np.float32, [2]), "q": (np.bool_, [])}, ["y"])
    with pytest.raises(ValueError, match=r"not understood: If \(choice: its condition is computed from data\)"):
        load(saved(proto, tmp_path))


def test_ways_to_use_an_operator_are_refused_before_the_export(tmp_path: Path) -> None:
    nodes = [
        NODE("Resize", ["x", "", "scales"], ["r"], name="up", coordinate_transformation_mode="tf_crop_and_resize"),
        NODE("LRN", ["x"], ["n"], name="norm", size=4),
        NODE("Add", ["r", "n"], ["y"]),
    ]
    proto = model(nodes, {"x": (np.float32, [1, 2, 4, 4])}, ["y"], {"scales": np.float32([1, 1, 1, 1])})
    with pytest.raises(
        ValueError, match=r"not understood: Resize \(up: coordinate_.* tf_crop_and_resize\); LRN \(norm: an even size"
    ):
        pk.optimize(saved(proto, tmp_path))


def test_sizes_that_do_not_meet_are_refused_by_node(tmp_path: Path) -> None:
    proto = classifier(sizes=["batch", 3, 9, 9])
    with pytest.raises(ValueError, match=r"model.onnx: not understood: Gemm \(gemm: RuntimeError: "):
        pk.optimize(saved(proto, tmp_path))


@pytest.mark.parametrize("opset", [6, 29])
def test_other_opsets_are_refused(opset: int, tmp_path: Path) -> None:
    proto = model([NODE("Relu", ["x"], ["y"])], {"x": (np.float32, [2])}, ["y"], opset=opset)
    with pytest.raises(ValueError, match=rf"model.onnx: its operators are of opset {opset}: 7 to 28 are understood"):
        load(saved(proto, tmp_path))


def test_functions_of_the_file_are_inlined(tmp_path: Path) -> None:
    proto = model([NODE("Twice", ["x"], ["y"], domain="com.example")], {"x": (np.float32, [2])}, ["y"])
    body = [NODE("Add", ["a", "a"], ["b"])]
    proto.functions.append(
        helper.make_function("com.example", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 18)])
    )
    assert torch.equal(load(saved(proto, tmp_path))(torch.tensor([1.0, 2.0])), torch.tensor([2.0, 4.0]))


def test_names_that_are_no_names_of_python(tmp_path: Path) -> None:
    nodes = [NODE("Mul", ["input.1", "1::weight"], ["class"])]
    inputs = {"input.1": (np.float32, [2])}
    graph = load(saved(model(nodes, inputs, ["class"], {"1::weight": np.float32([2, 3])}), tmp_path))
    assert torch.equal(graph(input_1=torch.ones(2)), torch.tensor([2.0, 3.0]))
    found = source_of(graph)
    assert found is not None and str(found.inputs[0]) == "input.1: float32[2]"


# ---- files of strangers ----------------------------------------------------------------------------------------------
def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pk.optimize(tmp_path / "none.onnx")


@pytest.mark.parametrize("dims", [[10**9, 10**9], [-1, 3], [3], [2**62, 2**62, 0]])
def test_sizes_without_bytes_are_refused(dims: list[int], tmp_path: Path) -> None:
    proto = classifier()
    if 0 in dims:
        proto.graph.initializer[0].raw_data = b""
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)
    with pytest.raises(ValueError, match=r"model.onnx: w: "):
        load(saved(proto, tmp_path))


@pytest.mark.parametrize(
    "node",
    [
        NODE("ConstantOfShape", ["many"], ["c"], name="big"),
        NODE("Expand", ["x", "many"], ["c"], name="big"),
        NODE("Tile", ["x", "many"], ["c"], name="big"),
    ],
    ids=lambda node: node.op_type,
)
def test_numbers_do_not_make_tensors_of_any_size(node: Any, tmp_path: Path) -> None:
    proto = model(
        [node, NODE("ReduceMax", ["c"], ["y"])], {"x": (np.float32, [1, 1])}, ["y"], {"many": np.array([2**20] * 2)}
    )
    with pytest.raises(
        ValueError, match=r"model.onnx: not understood: .* \(big: a tensor of sizes \[1048576, 1048576\]"
    ):
        pk.optimize(saved(proto, tmp_path))


def test_constants_are_not_padded_to_any_size(tmp_path: Path) -> None:
    nodes = [NODE("Pad", ["c", "sides"], ["p"], name="wide"), NODE("Add", ["x", "p"], ["y"])]
    proto = model(nodes, {"x": (np.float32, [1])}, ["y"], {"c": np.float32([1]), "sides": np.array([0, 2**33])})
    with pytest.raises(ValueError, match=r"not understood: Pad \(wide: a tensor of sizes \[8589934593\]"):
        load(saved(proto, tmp_path))


def test_what_torch_says_of_constants_is_an_error_of_the_file(tmp_path: Path) -> None:
    proto = model(
        [NODE("Add", ["a", "b"], ["c"], name="sum"), NODE("Add", ["c", "x"], ["y"])],
        {"x": (np.float32, [1])},
        ["y"],
        {"a": np.zeros((2, 3), np.float32), "b": np.zeros((4, 5), np.float32)},
    )
    with pytest.raises(ValueError, match=r"not understood: Add \(sum: RuntimeError: "):
        load(saved(proto, tmp_path))


BYTES = classifier(BY_SIZE).SerializeToString()


def survives(content: bytes, folder: Path) -> None:
    """It is read, or refused with an error that names the file."""
    path = folder / "damaged.onnx"
    path.write_bytes(content)
    try:
        graph = load(path)
        source = source_of(graph)
        assert source is not None
        graph(torch.zeros(2, 3, 6, 6))
    except ValueError as error:
        assert str(path) in str(error)
    except (RuntimeError, TypeError, IndexError, AttributeError, AssertionError, NotImplementedError):
        pass  # of torch, in the call: a graph that was read, of sizes that do not meet


@given(length=st.integers(0, len(BYTES) - 1))
def test_a_file_that_ends_early(length: int, tmp_path: Path) -> None:
    survives(BYTES[:length], tmp_path)


@given(changes=st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_a_file_with_other_bytes(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    content = bytearray(BYTES)
    for place, change in changes:
        content[place] ^= change
    survives(bytes(content), tmp_path)


def test_a_message_is_not_read_for_what_it_holds(tmp_path: Path) -> None:
    """A file of another format, one that is empty, and one of zeros."""
    for content in (b"", b"\0" * 100, b"PK\3\4" + b"\0" * 50, onnx.TensorProto().SerializeToString(), b"x" * 1000):
        path = tmp_path / "other.onnx"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other.onnx: "):
            load(path)


def test_a_constant_of_bytes_of_its_own(tmp_path: Path) -> None:
    half = numpy_helper.from_array(np.float16([1, 2]), "h")
    nodes = [NODE("Constant", [], ["h"], value=half), NODE("Cast", ["h"], ["c"], to=1), NODE("Add", ["x", "c"], ["y"])]
    brain = helper.make_tensor("b", TensorProto.BFLOAT16, [2], [0.5, 3.0])
    nodes += [
        NODE("Constant", [], ["b"], value=brain),
        NODE("Cast", ["b"], ["d"], to=1),
        NODE("Add", ["y", "d"], ["z"]),
    ]
    graph = load(saved(model(nodes, {"x": (np.float32, [2])}, ["z"]), tmp_path))
    assert torch.equal(graph(torch.zeros(2)), torch.tensor([1.5, 5.0]))

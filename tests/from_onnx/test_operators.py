"""Each operator of the table against ONNX's reference implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from onnx import helper, version_converter

from pykernels.from_onnx import load
from pykernels.from_onnx.table import OLDER, ON_SIZES, OPERATORS
from tests.from_onnx.onnx_models import answers, model, saved

IMAGE, LINE, ROWS = [2, 4, 6, 5], [2, 4, 9], [3, 8]


def some(*shape: int) -> Any:
    generator = np.random.default_rng(sum(shape))
    return generator.standard_normal(shape).astype(np.float32)


class Case(NamedTuple):
    """One node: its operator, the sizes of its first input, its constants behind it, its attributes."""

    kind: str
    shape: list[int]
    constants: list[Any] = []  # noqa: RUF012  (read alone)
    attributes: dict[str, Any] = {}  # noqa: RUF012
    opset: int = 18
    tolerance: float = 1e-5


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


WEIGHT, BIAS = some(6, 4, 3, 3), some(6)
GRID = {"kernel_shape": [3, 3]}
HOW = "coordinate_transformation_mode"
NORM = [some(4), some(4), some(4), np.abs(some(4)) + 1]
CASES = [
    Case("Conv", IMAGE, [WEIGHT, BIAS], {"pads": [1, 1, 1, 1]}),
    Case("Conv", IMAGE, [WEIGHT], {"pads": [0, 1, 2, 1], "strides": [2, 1]}),
    Case("Conv", IMAGE, [some(4, 1, 3, 3)], {"group": 4, "dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    Case("Conv", IMAGE, [WEIGHT], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", IMAGE, [WEIGHT], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    Case("Conv", IMAGE, [WEIGHT], {"auto_pad": "VALID"}),
    Case("Conv", LINE, [some(6, 4, 3)], {"pads": [1, 1]}),
    Case("Conv", [1, 2, 4, 4, 4], [some(3, 2, 3, 3, 3)]),
    Case("ConvTranspose", IMAGE, [some(4, 3, 2, 2), some(3)], {"strides": [2, 2]}),
    Case("ConvTranspose", IMAGE, [some(4, 3, 3, 3)], {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}),
    Case("ConvTranspose", IMAGE, [some(4, 3, 3, 3)], {"strides": [2, 2], "pads": [0, 1, 1, 0]}),
    Case("ConvTranspose", IMAGE, [some(4, 3, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("Gemm", ROWS, [some(5, 8), some(5)], {"transB": 1}),
    Case("Gemm", ROWS, [some(8, 5), some(1, 5)], {"alpha": 0.5, "beta": 2.0}),
    Case("Gemm", ROWS, [some(3, 5), some(8, 5)], {"transA": 1}),
    Case("MatMul", ROWS, [some(8, 5)]),
    Case("MatMul", [2, 3, 8], [some(8, 5)]),
    Case("MatMul", [2, 3, 8], [some(2, 8, 5)]),
    Case("Einsum", [2, 3, 8], [some(2, 8, 5)], {"equation": "bij,bjk->bik"}),
    Case("BatchNormalization", IMAGE, NORM, {"epsilon": 1e-3}),
    Case("InstanceNormalization", IMAGE, [some(4), some(4)]),
    Case("GroupNormalization", IMAGE, [some(4), some(4)], {"num_groups": 2}, opset=21),
    Case("LayerNormalization", [2, 3, 8], [some(8), some(8)], {"axis": -1}),
    Case("LayerNormalization", [2, 3, 8], [some(3, 8)], {"axis": 1, "epsilon": 1e-3}),
    Case("LpNormalization", ROWS, [], {"axis": 1}),
    Case("MaxPool", IMAGE, [], {**GRID, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    Case("MaxPool", IMAGE, [], {**GRID, "pads": [0, 0, 1, 1], "strides": [2, 2]}),
    Case("MaxPool", IMAGE, [], {**GRID, "ceil_mode": 1, "strides": [2, 2]}),
    Case("AveragePool", IMAGE, [], {**GRID, "pads": [1, 1, 1, 1]}),
    Case("AveragePool", IMAGE, [], {**GRID, "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", IMAGE, [], {**GRID, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("GlobalAveragePool", IMAGE),
    Case("GlobalMaxPool", IMAGE),
    *(Case(kind, ROWS) for kind in ("Abs", "Atan", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Identity")),
    *(Case(kind, ROWS) for kind in ("Mish", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin")),
    *(Case(kind, ROWS) for kind in ("Softplus", "Softsign", "Tan", "Tanh", "Elu", "Celu", "Selu", "LeakyRelu")),
    *(Case(kind, ROWS) for kind in ("HardSigmoid", "LogSoftmax", "Asinh", "Cosh", "Hardmax", "Shrink", "Sinh")),
    Case("Shrink", ROWS, [], {"bias": 0.1, "lambd": 0.3}),
    Case("Swish", ROWS, [], opset=24),
    Case("Swish", ROWS, [], {"alpha": 0.5}, opset=24),
    Case("MeanVarianceNormalization", IMAGE, [], {"axes": [1, 2]}),
    Case("RMSNormalization", [2, 3, 8], [some(8)], {"axis": -1}, opset=23),
    Case("RMSNormalization", [2, 3, 8], [some(1)], {"axis": 1, "epsilon": 1e-3}, opset=23),
    *(Case(kind, ROWS, [np.float32(1.5)]) for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")),
    *(Case(kind, ROWS, [some(3, 8)]) for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")),
    Case("Pow", ROWS, [np.float32(2)]),
    Case("Mod", ROWS, [np.float32(1.5)], {"fmod": 1}),
    Case("Clip", ROWS, [np.float32(0), np.float32(6)]),
    Case("Clip", ROWS, [np.float32(-0.5)]),
    Case("ThresholdedRelu", ROWS, [], {"alpha": 0.3}),
    Case("PRelu", IMAGE, [some(4, 1, 1)]),
    Case("HardSigmoid", ROWS, [], {"alpha": 1 / 6}),
    Case("Gelu", ROWS, opset=20),
    Case("Gelu", ROWS, [], {"approximate": "tanh"}, opset=20),
    Case("Softmax", [2, 3, 8], [], {"axis": 1}),
    Case("CumSum", ROWS, [np.int64(1)]),
    Case("CumSum", ROWS, [np.int64(-1)], {"exclusive": 1, "reverse": 1}),
    Case("Dropout", ROWS, [np.float32(0.5)]),
    *(Case(f"Reduce{kind}", IMAGE, [ints(2, 3)], {"keepdims": 0}) for kind in ("Mean", "Max", "Min", "Prod")),
    *(Case(f"Reduce{kind}", IMAGE, [ints(1)]) for kind in ("Sum", "L1", "L2", "SumSquare", "LogSumExp")),
    Case("ReduceMean", IMAGE, [], {"axes": [2, 3]}, opset=13),
    Case("ReduceSum", IMAGE),
    Case("Reshape", IMAGE, [ints(0, -1, 5)]),
    Case("Flatten", IMAGE),
    Case("Flatten", IMAGE, [], {"axis": 2}),
    Case("Transpose", IMAGE, [], {"perm": [0, 2, 3, 1]}),
    Case("Transpose", ROWS),
    Case("Squeeze", [2, 1, 3, 1], [ints(1, 3)]),
    Case("Unsqueeze", ROWS, [ints(0, -1)]),
    Case("Concat", ROWS, [some(3, 2)], {"axis": 1}),
    Case("Slice", IMAGE, [ints(1, 0), ints(2**63 - 1, -1), ints(2, 3), ints(2, 1)]),
    Case("Slice", ROWS, [ints(-1), ints(-(2**63)), ints(1), ints(-2)]),
    Case("Gather", IMAGE, [np.int64(1)], {"axis": 1}),
    Case("Gather", IMAGE, [np.array([[0, -1], [2, 1]])], {"axis": 2}),
    Case("GatherElements", ROWS, [np.array([[0, -1], [2, 1], [7, 3]])], {"axis": 1}),
    Case("GatherND", IMAGE, [np.array([[0, -1], [1, 2]])]),
    Case("GatherND", IMAGE, [np.array([[[0, -1], [1, 2]], [[3, 4], [0, 0]]])], {"batch_dims": 1}),
    Case("GatherND", [2, 3, 4, 5], [np.arange(6).reshape(2, 3, 1) % 4], {"batch_dims": 2}),
    Case("ScatterND", ROWS, [np.array([[0, -1], [2, 1]]), some(2)]),
    Case("ScatterND", ROWS, [np.array([[1], [1]]), some(2, 8)], {"reduction": "add"}),
    Case("ScatterElements", ROWS, [np.array([[0, -1], [2, 1]]), some(2, 2)], {"axis": 1}),
    *(
        Case("ScatterElements", ROWS, [np.array([[0, 0], [2, 1]]), some(2, 2)], {"axis": 1, "reduction": way})
        for way in ("add", "mul", "max", "min")
    ),
    Case("Expand", [3, 1], [ints(2, 1, 4)]),
    Case("Tile", ROWS, [ints(2, 1)]),
    Case("DepthToSpace", IMAGE, [], {"blocksize": 2}),
    Case("DepthToSpace", IMAGE, [], {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [1, 2, 4, 6], [], {"blocksize": 2}),
    Case("Trilu", ROWS, [], {"upper": 0}),
    Case("Pad", IMAGE, [ints(0, 0, 1, 0, 0, 0, 2, 1), np.float32(3)]),
    Case("Pad", IMAGE, [ints(0, 0, 1, 0, 0, 0, 2, 1)], {"mode": "reflect"}),
    Case("Pad", IMAGE, [ints(0, 0, 1, 0, 0, 0, 2, 1)], {"mode": "edge"}),
    Case("Pad", IMAGE, [ints(0, 0, 0, 1, 0, 0, 0, 2)], {"mode": "edge"}),  # one dimension of an image's two
    Case("Pad", IMAGE, [ints(0, 1, 2, 0, 0, 3, 1, 0)], {"mode": "reflect"}),  # of an image whose channels lie last
    Case("Pad", IMAGE, [ints(1, 0, 2, 0, 0, 0, 0, 0)], {"mode": "edge"}),
    Case("Pad", IMAGE, [ints(1, 0, 2, 0, 0, 0, 0, 0)], {"mode": "wrap"}, opset=19),
    Case("Resize", IMAGE, [some(0), np.float32([1, 1, 2, 2])], {HOW: "asymmetric", "nearest_mode": "floor"}),
    Case("Resize", IMAGE, [some(0), np.float32([1, 1, 3, 3])]),
    Case("Resize", IMAGE, [some(0), some(0), ints(2, 4, 9, 7)], {"mode": "linear"}),
    Case("Resize", IMAGE, [some(0), some(0), ints(2, 4, 9, 7)], {"mode": "linear", HOW: "align_corners"}),
    Case("Resize", IMAGE, [some(0), np.float32([1, 1, 2, 2])], {"mode": "cubic"}, tolerance=1e-4),
    # ways that torch has not
    Case("Resize", IMAGE, [some(0), np.float32([1, 1, 2, 2])], {"mode": "linear", HOW: "asymmetric"}),
    Case("Resize", IMAGE, [some(0), np.float32([1, 1, 0.6, 1])], {"mode": "linear", HOW: "half_pixel_symmetric"}, 19),
    Case("Resize", IMAGE, [some(0), some(0), ints(2, 4, 4, 9)], {HOW: "pytorch_half_pixel", "nearest_mode": "ceil"}),
    Case("Resize", IMAGE, [some(0), some(0), ints(2, 4, 7, 1)], {HOW: "align_corners"}),
    Case("Resize", IMAGE, [some(0), np.float32([1, 2, 2, 1])], {"mode": "linear"}),  # of channels that lie last
    Case(
        "Resize", IMAGE, [some(0), np.float32([1, 1, 2, 2])],
        {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}, tolerance=1e-4,
    ),
    Case("Attention", [2, 3, 5, 4], [some(2, 3, 6, 4), some(2, 3, 6, 4)], {"scale": 0.3}, opset=23),
    Case("Attention", [2, 5, 8], [some(2, 5, 8), some(2, 5, 8)], {"q_num_heads": 2, "kv_num_heads": 2}, opset=23),
    Case("Attention", [2, 4, 5, 4], [some(2, 2, 6, 4), some(2, 2, 6, 4), some(5, 6)], opset=23),
    Case("GridSample", [2, 3, 5, 6], [some(2, 4, 4, 2)]),
    Case("GridSample", [2, 3, 5, 6], [some(2, 4, 4, 2)], {"padding_mode": "border", "align_corners": 1}),
    Case("Clip", ROWS, [np.float32([0]), np.float32([6])]),  # as Paddle writes numbers
    Case("Add", ROWS, [np.float32([3])]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_an_operator_answers_as_its_reference(case: Case, tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(len(case.constants))]
    inputs = [
        name if np.asarray(value).size or case.kind != "Resize" else ""
        for name, value in zip(names, case.constants, strict=True)
    ]
    node = helper.make_node(case.kind, ["x", *inputs], ["y"], **case.attributes)
    constants = {name: value for name, value in zip(names, case.constants, strict=True) if name in inputs}
    proto = model([node], {"x": (np.float32, case.shape)}, ["y"], constants, case.opset)
    x = torch.from_numpy(some(*case.shape))
    (expected,) = answers(proto, x)
    y = load(saved(proto, tmp_path))(x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, atol=case.tolerance, rtol=case.tolerance)


# What the cases above do not call, with the test that does.
ELSEWHERE = {
    "of integers": "ArgMax ArgMin BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike OneHot",
    "of truths": "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Where Xor",
    "their domain": "Acos Acosh Asin Atanh Log ReduceLogSum Sqrt",
    "of sizes": "ConstantOfShape Range",
    "of several outputs": "GRU LSTM RNN Split TopK",
    "whose scales are computed": "ConvInteger DynamicQuantizeLinear MatMulInteger",
    "whose reference is wrong": "LRN",
}  # fmt: skip


def test_every_operator_of_the_table_has_a_case() -> None:
    assert {case.kind for case in CASES} | set(" ".join(ELSEWHERE.values()).split()) == set(OPERATORS)
    assert set(ON_SIZES) <= set(OPERATORS)
    assert {case.kind for case in OLD} >= set(OLDER)


SCALES = np.float32([1, 1, 2, 2])
OLD = [
    Case("Clip", ROWS, [], {"min": -0.5, "max": 0.5}, opset=10),
    Case("Clip", ROWS, [], {"min": 0.0}, opset=7),
    Case("Softmax", [2, 3, 8], opset=12),
    Case("Softmax", [2, 3, 8], [], {"axis": -1}, opset=11),
    Case("LogSoftmax", [2, 3, 8], [], {"axis": 0}, opset=7),
    Case("BatchNormalization", IMAGE, NORM, {"spatial": 1}, opset=7),
    Case("Upsample", IMAGE, [], {"scales": [1.0, 1.0, 2.0, 3.0]}, opset=7),
    Case("Upsample", IMAGE, [SCALES], opset=9),
    Case("Resize", IMAGE, [SCALES], opset=10),
    Case("Squeeze", [2, 1, 3, 1], [], {"axes": [1, 3]}, opset=12),
    Case("Unsqueeze", ROWS, [], {"axes": [0, 2]}, opset=11),
    Case("Slice", IMAGE, [], {"starts": [1, 0], "ends": [5, -1], "axes": [2, 3]}, opset=9),
    Case("Pad", IMAGE, [], {"pads": [0, 0, 1, 0, 0, 0, 2, 1], "value": 2.0}, opset=10),
    Case("ReduceSum", IMAGE, [], {"axes": [2, 3]}, opset=11),
    Case("Dropout", ROWS, [], {"ratio": 0.3}, opset=10),
    Case("Flatten", IMAGE, opset=8),
    Case("Gemm", ROWS, [some(5, 8), some(5)], {"transB": 1}, opset=7),
    Case("MaxPool", IMAGE, [], {**GRID, "strides": [2, 2]}, opset=8),
    Case("AveragePool", IMAGE, [], {**GRID, "pads": [1, 1, 1, 1]}, opset=7),
    Case("Reshape", IMAGE, [ints(0, -1)], opset=8),
]


@pytest.mark.parametrize("case", OLD, ids=lambda case: f"{case.kind}-{case.opset}")
def test_operators_of_older_opsets(case: Case, tmp_path: Path) -> None:
    """Beside the same model as onnx converts it; where that changes what is meant, beside torch."""
    constants = {f"c{i}": value for i, value in enumerate(case.constants)}
    node = helper.make_node(case.kind, ["x", *constants], ["y"], **case.attributes)
    proto = model([node], {"x": (np.float32, case.shape)}, ["y"], constants, case.opset)
    x = torch.from_numpy(some(*case.shape))
    y = load(saved(proto, tmp_path))(x)
    if case.kind in ("Softmax", "LogSoftmax"):
        axis = case.attributes.get("axis", 1) % x.dim()
        expected = getattr(torch, f"{'log_' * (case.kind[0] == 'L')}softmax")(x.flatten(axis), -1).reshape(x.shape)
    elif case.kind == "BatchNormalization":  # whose reference takes the means of x below opset 14
        scale, bias, mean, variance = map(torch.from_numpy, case.constants)
        expected = torch.nn.functional.batch_norm(x, mean, variance, scale, bias)
    elif case.kind in ("Upsample", "Resize"):
        factors = [int(factor) for factor in [*case.attributes.get("scales", SCALES)][2:]]
        expected = x.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
    else:
        (expected,) = answers(version_converter.convert_version(proto, 13), x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, atol=case.tolerance, rtol=case.tolerance)


def test_an_operator_is_what_it_was_in_its_opset(tmp_path: Path) -> None:
    proto = model([helper.make_node("Upsample", ["x"], ["y"])], {"x": (np.float32, IMAGE)}, ["y"], opset=9)
    proto.opset_import[0].version = 13
    with pytest.raises(ValueError, match=r"Upsample"):
        load(saved(proto, tmp_path))
    node = helper.make_node("BatchNormalization", ["x", "a", "b", "c", "d"], ["y"], spatial=0)
    proto = model([node], {"x": (np.float32, IMAGE)}, ["y"], dict(zip("abcd", NORM, strict=True)), 8)
    with pytest.raises(ValueError, match="a mean for each element"):
        load(saved(proto, tmp_path))(torch.zeros(IMAGE))


@pytest.mark.parametrize("kind", ELSEWHERE["their domain"].split())
def test_functions_of_positive_numbers(kind: str, tmp_path: Path) -> None:
    proto = model([helper.make_node(kind, ["x"], ["y"])], {"x": (np.float32, [4])}, ["y"])
    x = torch.rand(4) + (kind == "Acosh")
    torch.testing.assert_close(load(saved(proto, tmp_path))(x), answers(proto, x)[0])


@pytest.mark.parametrize("kind", ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
def test_comparisons_choose(kind: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node(kind, ["x", "c"], ["b"]),
        helper.make_node("Not", ["b"], ["n"]),
        helper.make_node("And", ["b", "t"], ["a"]),
        helper.make_node("Or", ["n", "a"], ["o"]),
        helper.make_node("Xor", ["o", "a"], ["e"]),
        helper.make_node("Where", ["e", "x", "d"], ["w"]),
        helper.make_node("IsNaN", ["w"], ["nan"]),
        helper.make_node("IsInf", ["w"], ["inf"]),
        helper.make_node("Or", ["nan", "inf"], ["odd"]),
        helper.make_node("Where", ["odd", "x", "w"], ["y"]),
    ]
    constants = {"c": np.float32(1), "t": np.array([True, False, True]), "d": np.float32(-np.inf)}
    proto = model(nodes, {"x": (np.float32, [2, 3])}, ["y"], constants)
    x = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    assert torch.equal(load(saved(proto, tmp_path))(x), answers(proto, x)[0])


def test_integers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Div", ["i", "two"], ["half"]),
        helper.make_node("ArgMax", ["half"], ["most"], axis=1, keepdims=1),
        helper.make_node("ArgMin", ["half"], ["least"], axis=1, keepdims=1),
        helper.make_node("Sub", ["most", "least"], ["apart"]),
        helper.make_node("CastLike", ["apart", "x"], ["z"]),
        helper.make_node("Cast", ["half"], ["h"], to=1),
        helper.make_node("Add", ["z", "h"], ["y"]),
    ]
    proto = model(nodes, {"i": (np.int64, [2, 3]), "x": (np.float32, [1])}, ["y"], {"two": np.int64(2)})
    inputs = torch.tensor([[-3, 5, 8], [7, -9, 1]]), torch.zeros(1)
    assert torch.equal(load(saved(proto, tmp_path))(*inputs), answers(proto, *inputs)[0])


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_bits_and_one_hot(axis: int, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("BitwiseAnd", ["i", "six"], ["a"]),
        helper.make_node("BitwiseOr", ["a", "one"], ["b"]),
        helper.make_node("BitwiseXor", ["b", "six"], ["c"]),
        helper.make_node("BitwiseNot", ["c"], ["d"]),
        helper.make_node("OneHot", ["d", "depth", "ends"], ["y"], axis=axis),
    ]
    constants = {"six": np.int64(6), "one": np.int64(1), "depth": np.int64(5), "ends": np.float32([-1, 2])}
    proto = model(nodes, {"i": (np.int64, [2, 3])}, ["y"], constants)
    x = torch.arange(6).reshape(2, 3)
    assert torch.equal(load(saved(proto, tmp_path))(x), answers(proto, x)[0])


def test_local_response_normalization(tmp_path: Path) -> None:
    """ONNX Runtime and this formula, the document's, agree; the reference implementation of onnx 1.23 does not."""
    proto = model([helper.make_node("LRN", ["x"], ["y"], size=3, alpha=0.1)], {"x": (np.float32, IMAGE)}, ["y"])
    x = torch.randn(IMAGE)
    square = torch.nn.functional.pad(x**2, (0, 0, 0, 0, 1, 1))
    window = square[:, :-2] + square[:, 1:-1] + square[:, 2:]
    torch.testing.assert_close(load(saved(proto, tmp_path))(x), x / (1 + 0.1 / 3 * window) ** 0.75)


@pytest.mark.parametrize("auto_pad, rows", [("NOTSET", slice(2, -1)), ("SAME_UPPER", slice(1, -2))])
def test_a_transposed_convolution_of_a_given_size(auto_pad: str, rows: slice, tmp_path: Path) -> None:
    """As ONNX Runtime cuts it; the reference implementation of onnx 1.23 fails."""
    how = {"strides": [2, 2], "output_shape": [11, 12], "auto_pad": auto_pad}
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], **how)
    weight, x = some(4, 3, 4, 4), torch.randn(IMAGE)
    proto = model([node], {"x": (np.float32, IMAGE)}, ["y"], {"w": weight})
    whole = torch.nn.functional.conv_transpose2d(x, torch.from_numpy(weight), stride=2)
    torch.testing.assert_close(load(saved(proto, tmp_path))(x), whole[:, :, rows])


def test_several_outputs_have_the_names_of_the_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3),
        helper.make_node("Split", ["x", "sizes"], ["d", "e"], axis=1),
        helper.make_node("TopK", ["e", "k"], ["f", "i"]),
    ]
    names = ["c", "a", "b", "d", "f"]
    proto = model(nodes, {"x": (np.float32, [2, 8])}, names, {"sizes": ints(2, 6), "k": ints(3)})
    x = torch.randn(2, 8)
    found = load(saved(proto, tmp_path))(x)
    assert list(found) == names
    for y, expected in zip(found.values(), answers(proto, x), strict=True):
        assert torch.equal(y, expected)

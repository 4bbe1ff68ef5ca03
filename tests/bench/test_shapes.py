"""The shapes: data files that hold what they say, and cases made of them that agree with their oracle."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from pykernels.bench import zoo
from pykernels.bench.families import FAMILIES, cases, load_shapes


def test_every_family_has_shapes():
    assert {data["family"] for data in load_shapes().values()} == set(FAMILIES)


def test_the_shapes_that_the_project_promises_are_there():
    shapes = load_shapes()
    assert {"resnet18", "resnet50", "vgg16", "mobilenet_v2", "bert_base", "llm_4096"} <= shapes.keys()
    assert {s["name"] for s in shapes["networks"]["layers"]} >= {
        "resnet50", "resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121",
        "regnet_y_800mf", "shufflenet_v2_x1_0", "vit_b_16", "bert_base", "unet",
    }  # fmt: skip
    gemms = {(s["m"], s["k"], s["n"]) for s in shapes["gemm"]["layers"]}
    assert gemms == {(512, 1024, 4096), (1024, 4096, 4096), (1, 4096, 4096), (16, 4096, 4096)}
    assert shapes["bert_base"]["rows"] == shapes["llm_4096"]["rows"] == [1, 16, 128, 512]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"family": "poetry", "layers": [{}]}, "family"),
        ({"family": "gemm", "layers": []}, "layers"),
        ({"family": "gemm", "layers": [{"m": 1, "k": 2}]}, "lacks n"),
        ({"family": "linear", "layers": [{"name": "", "k": 1, "n": 1, "activation": "none", "count": 1}]}, "rows"),
    ],
)
def test_a_wrong_shape_file_is_refused_by_name(tmp_path, data, message):
    (tmp_path / "mine.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"mine.json: .*{message}"):
        load_shapes(tmp_path)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_layers_of_a_network_are_those_of_its_shape_file(name):
    model, seen = zoo.network(name), {}

    def hook(conv: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        key = (
            conv.in_channels,
            conv.out_channels,
            inputs[0].shape[2],
            conv.kernel_size[0],
            conv.stride[0],
            conv.groups,
        )
        seen[key] = seen.get(key, 0) + 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    listed: dict[tuple[int, ...], int] = {}
    for s in load_shapes()[name]["layers"]:
        key = (s["in"], s["out"], s["size"], s["kernel"], s["stride"], s["groups"])
        listed[key] = listed.get(key, 0) + s["count"]
    assert listed == seen


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "network"])
def test_a_case_is_the_same_each_time_and_its_parts_fit_together(family):
    _, make = next(iter(cases(family)))
    case, again = make(), make()
    assert torch.equal(case.oracle, again.oracle)
    assert set(case.precisions) <= set(case.traffic)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in case.inputs if x.dim() == 4)
    for precision in case.precisions:
        assert (
            case.error(
                precision, case.oracle if case.quantized is None or precision != "int8" else case.quantized.expected
            )
            == 0
        )


def test_a_quantized_convolution_is_close_to_the_float_one_it_was_made_of():
    make = next(make for label, make in cases("conv", ("mobilenet_v2",)) if " dw " in label)
    case = make()
    layer = case.quantized
    real = (layer.expected.float() - layer.out_zero_point) * layer.out_scale
    assert (real - case.oracle.clamp(max=6)).norm() < 0.05 * case.oracle.norm()


def test_the_operations_of_a_network_are_counted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))
    work, values, weights = zoo.count(model, torch.zeros(2, 3, 8, 8))
    assert work == 2 * 2 * (3 * 4 * 9 * 64 + 256 * 10)
    assert values == 2 * 3 * 64 + 2 * 10
    assert weights == sum(p.numel() for p in model.parameters())


def test_the_products_of_attention_are_counted_and_rows_looked_up_are_no_weights():
    model = zoo.Encoder(layers=1, width=8, heads=2, inner=16, words=50, positions=20).eval()
    work, _, weights = zoo.count(model, torch.zeros(1, 5, dtype=torch.int64))
    assert work == 2 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 5 * 5 * 8
    assert weights == sum(p.numel() for p in model.parameters()) - 70 * 8


def test_the_u_net_answers_for_each_pixel():
    with torch.inference_mode():
        assert zoo.UNet(width=2)(torch.zeros(1, 3, 32, 48)).shape == (1, 2, 32, 48)


def test_settled_batch_norms_pass_on_a_steady_scale():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    x = torch.randn(4, 3, 16, 16) * 50
    y = zoo.settle(model, x)(x)
    assert not model.training
    assert float(y.detach().std()) == pytest.approx(1.0, abs=0.1)


def test_a_head_that_begins_with_zeros_answers_with_numbers():
    vit = zoo.network("vit_b_16", size=32, image_size=32)
    with torch.inference_mode():
        assert vit(torch.randn(1, 3, 32, 32)).any()


def test_an_unknown_network_is_refused_by_name():
    with pytest.raises(ValueError, match="no network 'resnet19'"):
        zoo.network("resnet19")

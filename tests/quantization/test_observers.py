"""The ranges calibration chooses."""

from __future__ import annotations

import pytest
import torch

from pykernels.quantization.observers import MSEObserver, PerChannelMSEObserver


def activation_observer() -> MSEObserver:
    return MSEObserver(quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)


def squared_error(x: torch.Tensor, scale: float, zero_point: int) -> float:
    q = (torch.round(x / scale) + zero_point).clamp(0, 255)
    return float(((q - zero_point) * scale - x).square().sum())


def test_pixels_are_held_exactly() -> None:
    observer = activation_observer()
    pixels = (torch.arange(256.0) - 127) / 128
    observer(pixels.repeat(10))
    scale, zero_point = observer.calculate_qparams()
    assert float(scale) == pytest.approx(1 / 128, rel=1e-6) and int(zero_point) == 127


def test_outliers_do_not_cost_everyone_else_precision() -> None:
    x = torch.cat([torch.randn(200_000), torch.tensor([40.0, -35.0])])
    observer = activation_observer()
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    minmax = (x.max() - x.min()).item() / 255
    assert squared_error(x, float(scale), int(zero_point)) < squared_error(x, minmax, round(35 / minmax)) * 0.8


def test_batches_add_up_to_the_whole() -> None:
    x = torch.randn(64, 1000) * torch.linspace(0.1, 5, 64)[:, None]
    whole, parts = activation_observer(), activation_observer()
    whole(x)
    for part in x.split(4):
        parts(part)
    assert float(parts.calculate_qparams()[0]) == pytest.approx(float(whole.calculate_qparams()[0]), rel=0.05)


def test_zero_is_exact_even_when_unseen() -> None:
    observer = activation_observer()
    observer(torch.rand(1000) + 3)
    scale, zero_point = observer.calculate_qparams()
    assert int(zero_point) == 0 and float(scale) * 255 >= 3.5


def test_a_constant_zero_tensor_is_no_error() -> None:
    observer = activation_observer()
    observer(torch.zeros(10))
    scale, zero_point = observer.calculate_qparams()
    assert float(scale) > 0 and 0 <= int(zero_point) <= 255


def test_nan_in_calibration_is_named() -> None:
    with pytest.raises(ValueError, match="calibration"):
        activation_observer()(torch.tensor([1.0, float("nan")]))


def test_converting_without_calibration_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="calibration"):
        activation_observer().calculate_qparams()


def test_each_weight_channel_has_its_scale() -> None:
    weight = torch.randn(4, 16, 3, 3) * torch.tensor([0.01, 1.0, 5.0, 0.0]).reshape(4, 1, 1, 1)
    observer = PerChannelMSEObserver(quant_min=-127, quant_max=127, qscheme=torch.per_channel_symmetric, ch_axis=0)
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    assert scale.shape == (4,) and not zero_point.any()
    assert (scale[:3] * 127 <= weight.abs().amax((1, 2, 3))[:3] * 1.0001).all() and scale[3] > 0

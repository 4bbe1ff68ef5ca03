"""Observers: what calibration remembers of a tensor, and the range it chooses.

Both choose the range that minimises the mean squared rounding-plus-clipping error of the values seen, the criterion of
"norm minimization" (Caffe2) and of Banner et al. 2019, "Post training 4-bit quantization of convolutional networks".
"""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e import UniformQuantizationObserverBase

BINS = 8192
# Of a larger tensor every k-th value is counted (k odd, so that no power-of-two row length is sampled in step); the
# extremes are always those of all values.
COUNTED = 1 << 19
WEIGHED = 1 << 10  # of a longer row of weights likewise
IN_CACHE = 1 << 18  # weights looked at together: 1 MB
SHRINKS = 1.0 - torch.arange(0, 60) * 0.01  # of the seen extreme: 1.00, 0.99 … 0.41


class MSEObserver(UniformQuantizationObserverBase):
    """Per-tensor affine observer: a histogram of the values seen, then the range of least squared error.

    The histogram has ``BINS`` equal bins over a range that only grows, by doubling, so that old counts move to new bins
    exactly (two neighbours into one). Zero is always a bin edge and always in the chosen range, exactly representable.
    """

    histogram: torch.Tensor
    span: torch.Tensor
    min_val: torch.Tensor
    max_val: torch.Tensor

    def __init__(self, dtype: torch.dtype = torch.uint8, **kwargs: Any) -> None:
        super().__init__(dtype=dtype, **kwargs)
        if self.qscheme != torch.per_tensor_affine:
            raise ValueError(f"qscheme: MSEObserver is per-tensor affine, not {self.qscheme}")
        self.register_buffer("histogram", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("span", torch.tensor(0.0))  # the bins cover [-span, span]
        self.register_buffer("min_val", torch.tensor(float("inf")))
        self.register_buffer("max_val", torch.tensor(float("-inf")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Count the values of ``x``, any shape, and return it unchanged. Raises ValueError on NaN or infinity."""
        if x.numel() == 0:
            return x
        if self.histogram.device != x.device:
            self.to(x.device)
        values = x.detach().float()
        low, high = torch.aminmax(values)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError("calibration: an activation holds NaN or infinity; check the calibration inputs")
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))
        self._grow(float(torch.maximum(-low, high)))
        if self.span > 0:
            step = values.numel() // COUNTED | 1
            counted = values.reshape(-1)[::step]
            counts = torch.histc(counted, BINS, -float(self.span), float(self.span))
            self.histogram += counts.double() * (values.numel() / counted.numel())
        return x

    def _grow(self, needed: float) -> None:
        if self.span == 0:
            self.span.fill_(needed)
        while float(self.span) < needed:
            half = self.histogram.reshape(-1, 2).sum(1)
            self.histogram.zero_()
            self.histogram[BINS // 4 : BINS // 4 * 3] = half
            self.span *= 2

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale fp32 [1] and zero point int64 [1] of the range of least squared error."""
        if self.max_val < self.min_val:
            raise RuntimeError("calibration: an observer saw no data; calibrate before converting")
        low, high = self.chosen_range()
        device = self.eps.device
        return self._calculate_qparams(torch.tensor(low, device=device), torch.tensor(high, device=device))

    def chosen_range(self) -> tuple[float, float]:
        """The range (low <= 0 <= high): coordinate descent over shrunken ends, starting from the extremes seen."""
        low, high = min(float(self.min_val), 0.0), max(float(self.max_val), 0.0)
        if low == high:
            return low, high
        span = float(self.span)
        width = 2 * span / BINS
        histogram = self.histogram.cpu()
        used = histogram > 0
        centres = ((torch.arange(BINS, dtype=torch.float64) + 0.5) * width - span)[used]
        # The extreme bins are only partly filled: keep their centres inside what was really seen.
        centres = centres.clamp(float(self.min_val), float(self.max_val))
        counts = histogram[used]
        best_low, best_high = 1.0, 1.0
        for _ in range(3):
            before = best_low, best_high
            if high > 0:
                candidates = SHRINKS.double()
                lows = torch.full_like(candidates, low * best_low)
                best_high = float(candidates[self._errors(centres, counts, lows, candidates * high).argmin()])
            if low < 0:
                candidates = SHRINKS.double()
                highs = torch.full_like(candidates, high * best_high)
                best_low = float(candidates[self._errors(centres, counts, candidates * low, highs).argmin()])
            if (best_low, best_high) == before:
                break
        return low * best_low, high * best_high

    def _errors(
        self, centres: torch.Tensor, counts: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor
    ) -> torch.Tensor:
        """Summed squared error of quantizing the histogram with each range (lows[i], highs[i]): fp64 [candidates]."""
        levels = self.quant_max - self.quant_min
        scale = ((highs - lows) / levels)[:, None]
        zero = torch.round(self.quant_min - lows[:, None] / scale).clamp(self.quant_min, self.quant_max)
        quantized = (torch.round(centres[None] / scale) + zero).clamp(self.quant_min, self.quant_max)
        return ((quantized - zero) * scale - centres[None]).square().mul(counts[None]).sum(1)


class PerChannelMSEObserver(UniformQuantizationObserverBase):
    """Per-channel symmetric observer for weights: for each channel the clipping of least squared error."""

    def __init__(self, dtype: torch.dtype = torch.int8, ch_axis: int = 0, **kwargs: Any) -> None:
        super().__init__(dtype=dtype, **kwargs)
        if self.qscheme != torch.per_channel_symmetric:
            raise ValueError(f"qscheme: PerChannelMSEObserver is per-channel symmetric, not {self.qscheme}")
        self.ch_axis = ch_axis
        self._seen: tuple[int, int] | None = None
        self.register_buffer("min_val", torch.tensor([]))
        self.register_buffer("max_val", torch.tensor([]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Choose the scale of each channel of the weight ``x`` and return it unchanged."""
        seen = (x.data_ptr(), 0 if x.is_inference() else x._version)  # inference tensors count no versions
        if seen == self._seen:  # a frozen weight passes here with every calibration batch
            return x
        self._seen = seen
        rows = x.detach().float().movedim(self.ch_axis, 0).flatten(1)
        at_once = max(1, IN_CACHE // max(1, min(rows.shape[1], WEIGHED)))
        best = torch.cat([self._clipping(some) for some in rows.split(at_once)])
        self.min_val, self.max_val = -best, best
        return x

    def _clipping(self, rows: torch.Tensor) -> torch.Tensor:
        """Where to clip each row, fp32 [rows]: candidates tried on every k-th weight of a long row."""
        extreme = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        best, least = extreme, torch.full_like(extreme, float("inf"))
        counted = rows[:, :: rows.shape[1] // WEIGHED | 1].contiguous()
        for shrink in SHRINKS[:40].tolist():
            scale = (extreme * shrink / self.quant_max)[:, None]
            quantized = counted.div(scale).round_().clamp_(self.quant_min, self.quant_max)
            error = quantized.mul_(scale).sub_(counted).square_().sum(1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, extreme * shrink, best)
        return best

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale fp32 [channels] and zero point 0 int64 [channels]."""
        if self.max_val.numel() == 0:
            raise RuntimeError("calibration: a weight observer saw no weight; calibrate before converting")
        scale = (self.max_val / self.quant_max).clamp_min(float(self.eps))
        return scale, torch.zeros_like(scale, dtype=torch.int64)

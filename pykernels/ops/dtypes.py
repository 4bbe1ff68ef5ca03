"""The dtypes that our kernels take for real numbers, and what the names of precisions store them in."""

from __future__ import annotations

import torch

__all__ = ["REALS", "STORED"]

REALS = (torch.float32, torch.bfloat16, torch.float16)
# Precisions of 16-bit weights and activations; sums are fp32. The others keep the dtypes that they find.
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16}

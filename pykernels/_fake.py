"""Shape functions of the ops: what torch.compile and torch.export see instead of a kernel.

Each follows its op's section in csrc/schema.cpp. They must be right for contiguous and channels_last inputs and for symbolic
sizes, so they compute with sizes only and never read a packed tensor.
"""

from __future__ import annotations

import torch

from pykernels import _load



"""The oracle: every op in plain torch, written for clarity, a file a family. Tests and benchmarks import it; nothing
else does.

Integer results are exact: kernels agree with them bit for bit, except behind silu, sigmoid, gelu and tanh, where the
kernels' own exp and erf may differ from torch's by a rounding, so a quantized result by one.
"""

from pykernels.reference.attention import *  # noqa: F403
from pykernels.reference.compress import *  # noqa: F403
from pykernels.reference.dot import *  # noqa: F403
from pykernels.reference.normalize import *  # noqa: F403
from pykernels.reference.pointwise import *  # noqa: F403
from pykernels.reference.pool import *  # noqa: F403
from pykernels.reference.quantize import *  # noqa: F403
from pykernels.reference.upsample import *  # noqa: F403

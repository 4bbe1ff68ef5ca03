"""The hook functions, in torch's convention: ``ddp.register_comm_hook(comm.Int8State(group), comm.int8_hook)``."""

# No postponed annotations: DistributedDataParallel compares those of a hook with the classes themselves.
from torch._C._distributed_c10d import GradBucket

from pykernels.comm.auto import AutoState
from pykernels.comm.dense import Bf16State, Fp8State, Fp16State, Int2State, Int4State, Int8State, OneBitState
from pykernels.comm.lanes import Averaged
from pykernels.comm.plain import Fp32State
from pykernels.comm.powersgd import PowerSGDState
from pykernels.comm.sparse import RandomKState, TopKState
from pykernels.comm.two_level import TwoLevelState


def int8_hook(state: Int8State, bucket: GradBucket) -> Averaged:
    """8-bit integers and a scale for every 256 gradients: a quarter of the bytes."""
    return state(bucket)


def int4_hook(state: Int4State, bucket: GradBucket) -> Averaged:
    """4-bit integers and a scale for every 256 gradients: an eighth of the bytes."""
    return state(bucket)


def int2_hook(state: Int2State, bucket: GradBucket) -> Averaged:
    """-1, 0 or 1 and a scale for every 256 gradients: a fifteenth of the bytes."""
    return state(bucket)


def onebit_hook(state: OneBitState, bucket: GradBucket) -> Averaged:
    """Signs and a scale for every 1024 gradients: a thirty-first of the bytes."""
    return state(bucket)


def fp8_hook(state: Fp8State, bucket: GradBucket) -> Averaged:
    """8-bit floats (e4m3) and a scale for every 256 gradients: a quarter of the bytes, small gradients kept better."""
    return state(bucket)


def bf16_hook(state: Bf16State, bucket: GradBucket) -> Averaged:
    """bfloat16 on the wire, sums in fp32: half of the bytes."""
    return state(bucket)


def fp16_hook(state: Fp16State, bucket: GradBucket) -> Averaged:
    """float16 on the wire, at most 65504, sums in fp32: half of the bytes."""
    return state(bucket)


def topk_hook(state: TopKState, bucket: GradBucket) -> Averaged:
    """The largest hundredth (by default) of the gradients: a 50th of the bytes for two ranks, more ranks send more."""
    return state(bucket)


def randomk_hook(state: RandomKState, bucket: GradBucket) -> Averaged:
    """Gradients at random positions, the same on every rank: with 1 %, a hundredth of the bytes."""
    return state(bucket)


def powersgd_hook(state: PowerSGDState, bucket: GradBucket) -> Averaged:
    """Products of thin matrices instead of gradient matrices: r * (n + m) numbers instead of n * m."""
    return state(bucket)


def two_level_hook(state: TwoLevelState, bucket: GradBucket) -> Averaged:
    """fp32 inside a host, a dense codec between hosts."""
    return state(bucket)


def fp32_hook(state: Fp32State, bucket: GradBucket) -> Averaged:
    """No compression: the all-reduce that DistributedDataParallel makes without a hook."""
    return state(bucket)


def auto_hook(state: AutoState, bucket: GradBucket) -> Averaged:
    """For each bucket the codec that is predicted to be the fastest here."""
    return state(bucket)

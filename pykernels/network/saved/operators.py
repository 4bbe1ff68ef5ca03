"""Which functions a saved graph may call, and by what name: an allow-list, since a file is not trusted.

Allowed are, by their names ``namespace.operator.overload``:

- ops of ours that compute: no ``*_pack``, no codecs, none that begins with an underscore;
- ATen's functional ops of which torch tags an overload core or pointwise, or that are views by their schemas, but those
  of `_NEVER`, those that begin with an underscore, and backward passes;
- ATen's functional ops of `_OPS`, which have no such tag, and the underscored ones of `_UNDERSCORED`;
- in-place twins of pointwise ops, and ``copy_``, with which networks write their state;
- `_FUNCTIONS` on sizes, and ``torch.cond``.

So nothing touches files, processes, storages or uninitialized memory, and no tensor is sparse, quantized or of another
library's layout: torch checks those least. Ops whose CPU kernels trust shapes are called through `checked`, those that
overflow on absurd numbers take none (`check`).
"""

from __future__ import annotations

import functools
import math
import operator
import re
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from pykernels.network.saved.checked import CHECKED

__all__ = ["check", "find", "name_of"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COND = torch.ops.higher_order.cond
_OPERATOR = _words("add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_ not_ getitem")
_TORCH = _words("sym_max sym_min sym_not sym_int sym_float sym_ite _sym_sqrt")
# Functions that compute with sizes; `getitem` also takes a result out of several.
_FUNCTIONS: dict[str, Any] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    "higher_order.cond": _COND,
}
_UNDERSCORED = _words(
    """
    _softmax _log_softmax _to_copy _unsafe_view _convolution _adaptive_avg_pool2d _adaptive_avg_pool3d
    _native_batch_norm_legit_no_training _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math
    _assert_tensor_metadata _assert_scalar _assert_async _local_scalar_dense _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa _shape_as_tensor _reshape_alias_copy __and__ __or__ __xor__ __lshift__ __rshift__
    """
)
# Tagged core, or views, and yet: memory that holds what was there before, raw layouts, sparse tensors.
_NEVER = _words(
    """
    empty empty_strided empty_like lift slice_inverse pin_memory coalesce values indices col_indices row_indices
    crow_indices ccol_indices
    """
)
_OPS = _words(
    """
    absolute adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d addbmm
    addmv addr affine_grid_generator alias_copy all alpha_dropout aminmax arange arccos arccosh arcsin arcsinh arctan
    arctan2 arctanh argsort argwhere as_strided_scatter atleast_1d atleast_2d atleast_3d baddbmm bartlett_window
    batch_norm bernoulli bilinear binary_cross_entropy binary_cross_entropy_with_logits bincount blackman_window
    block_diag broadcast_tensors bucketize cartesian_prod cdist chain_matmul channel_shuffle cholesky cholesky_inverse
    cholesky_solve column_stack combinations complex concat concatenate conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d conv_transpose3d corrcoef cosine_similarity count_nonzero cov cross cross_entropy_loss cummax
    cummin cumprod cumulative_trapezoid det detach_copy diag diag_embed diagflat diagonal_copy diagonal_scatter diff
    dist divide dot dropout dstack einsum expand_copy eye feature_dropout fft_fft fft_fft2 fft_fftfreq fft_fftn
    fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft
    fft_rfft2 fft_rfftfreq fft_rfftn fix fliplr flipud floor_divide frobenius_norm glu greater greater_equal
    grid_sampler grid_sampler_3d group_norm gru gru_cell hamming_window hann_window hardswish hstack huber_loss im2col
    index_add index_copy index_fill index_reduce inner instance_norm inverse isclose isin isreal istft item
    kaiser_window kl_div kron kthvalue l1_loss layer_norm less less_equal lift_fresh lift_fresh_copy linalg_cholesky
    linalg_cholesky_ex linalg_cond linalg_cross linalg_det linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
    linalg_inv linalg_inv_ex linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_matmul linalg_matrix_exp
    linalg_matrix_norm linalg_matrix_power linalg_matrix_rank linalg_multi_dot linalg_norm linalg_pinv linalg_qr
    linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv
    linalg_tensorsolve linalg_vander linalg_vecdot linalg_vector_norm linear linspace log_sigmoid log_sigmoid_forward
    log_softmax logcumsumexp logdet logspace logsumexp lstm lstm_cell masked_select matmul matrix_exp matrix_power
    max_pool1d max_pool1d_with_indices max_pool2d max_pool3d max_unpool2d max_unpool3d median meshgrid mode mse_loss
    msort multinomial multiply mv nanmean nanmedian nanquantile nansum narrow_copy native_channel_shuffle negative
    new_full new_ones new_zeros nll_loss nll_loss2d nll_loss_nd nonzero_numpy nonzero_static norm normal
    normal_functional not_equal nuclear_norm one_hot ones ones_like outer pad pad_sequence pairwise_distance pdist
    permute_copy pinverse pixel_shuffle pixel_unshuffle polar prelu qr quantile rand_like randint randint_like
    randn_like range renorm repeat_interleave rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell roll rot90
    row_stack scaled_dot_product_attention searchsorted select_copy slice_copy slogdet smooth_l1_loss softmax
    special_digamma special_erf special_erfc special_erfinv special_exp2 special_expit special_expm1 special_gammainc
    special_gammaincc special_gammaln special_i0 special_log1p special_log_softmax special_logit special_logsumexp
    special_multigammaln special_ndtr special_polygamma special_psi special_round special_sinc special_softmax
    special_xlogy split_copy split_with_sizes_copy squeeze_copy stack std std_mean stft subtract sum_to_size svd
    sym_constrain_range sym_constrain_range_for_size t_copy take take_along_dim tensordot tile trace transpose_copy
    trapezoid trapz triangular_solve tril tril_indices triu triu_indices true_divide type_as unbind_copy
    unflatten_dense_tensors unfold_copy uniform unique_consecutive unique_dim unique_dim_consecutive unsafe_chunk
    unsafe_split unsafe_split_with_sizes unsqueeze_copy upsample_bicubic2d upsample_linear1d upsample_nearest1d
    upsample_nearest3d upsample_trilinear3d vander var_mean vdot view_as_complex_copy view_as_real_copy view_copy vstack
    zero zeros zeros_like
    """
)
_ZEROS = {
    torch.ops.aten.empty.memory_format: torch.ops.aten.zeros.default,
    torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default: torch.ops.aten.new_zeros.default,
}
_BACK = {function: target for target, function in CHECKED.items()}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
# Arguments that torch multiplies with one another unchecked.
_GEOMETRY = _words("kernel_size stride padding dilation output_padding")
_MOST = 2**24
# Types of arguments, as schemas spell them.
_TYPES = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": torch.device,
}
_PLAIN = ("Tensor", "List[", "int", "SymInt", "float", "bool", "number", "Scalar", "str", "Optional[")
_SCALES = re.compile(r"scale_factors|scales(_[dhw])?\Z")


def name_of(target: Any, kwargs: Any = ()) -> str:
    """The name of a function that a saved graph may call, with keyword arguments of these names.

    Memory that is not yet written holds zeros in a saved network.

    Raises:
        ValueError: it may not.
    """
    target = _BACK.get(target, target)
    zeros = _ZEROS.get(target)
    if zeros is not None and set(kwargs) <= {argument.name for argument in zeros._schema.arguments}:
        target = zeros
    if isinstance(target, torch._ops.OpOverload):
        if _allowed(target):
            return str(target)
    else:
        for name, function in _FUNCTIONS.items():
            if target is function:
                return name
    raise ValueError(f"it calls {target}, which is not among the operators of a saved network")


def find(name: Any) -> Any:
    """The function of a name, the checked one where there is one.

    Raises:
        ValueError: a saved graph may call no such function.
    """
    if type(name) is str:
        if name in _FUNCTIONS:
            return _FUNCTIONS[name]
        namespace, *parts = name.split(".")
        if namespace in ("aten", "pykernels") and len(parts) == 2 and all(map(_NAME.match, parts)):
            packet = getattr(getattr(torch.ops, namespace), parts[0], None)
            if isinstance(packet, torch._ops.OpOverloadPacket):
                target = getattr(packet, parts[1], None)
                if isinstance(target, torch._ops.OpOverload) and _allowed(target):
                    return CHECKED.get(target, target)
    raise ValueError(f"it calls {name!r}, which is not among the operators of a saved network")


@functools.cache
def _allowed(target: torch._ops.OpOverload) -> bool:
    packet, schema = str(target.overloadpacket).split(".")[-1], target._schema
    if target.namespace == "pykernels":
        return not (schema.is_mutable or packet.startswith("_") or packet.endswith("_pack"))
    if target.namespace != "aten" or "backward" in packet or packet in _NEVER:
        return False
    family = target.overloadpacket
    tags = {tag for overload in family.overloads() for tag in getattr(family, overload).tags}
    pointwise = torch.Tag.pointwise in tags
    if schema.is_mutable:
        return packet == "copy_" or (pointwise and packet.endswith("_") and not packet.startswith("_"))
    if packet.startswith("_"):
        return packet in _UNDERSCORED
    view = any(result.alias_info is not None for result in schema.returns)
    return packet in _OPS or pointwise or view or torch.Tag.core in tags


def check(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that torch takes and should not, and numbers that make it overflow or Python compute for long.

    What is a dtype, device, layout or memory format in a schema is one here: torch takes numbers there, and looks them
    up unchecked. Padding, stride and the like are at most 2**24; they may be results of other calls, but for dilations
    and the scales of a resizing.

    Raises:
        ValueError: an argument is of another type or out of range.
    """
    target = _BACK.get(target, target)
    if not isinstance(target, torch._ops.OpOverload):
        if target is not _COND:
            _check_function(target, args, kwargs)
        return
    for position, name, kind in _limited(target):
        given = args[position] if position < len(args) else kwargs.get(name)
        if not isinstance(kind, str):
            if given is not None and not isinstance(given, kind):
                raise ValueError(f"{target}: {name} is a {type(given).__name__}")
            continue
        least = 1 / _MOST if kind == "scale" else -_MOST
        for leaf in pytree.tree_leaves(given):
            if leaf is None or (isinstance(leaf, fx.Node) and kind == "size"):
                continue
            if not isinstance(leaf, (int, float)) or not least <= leaf <= _MOST:
                raise ValueError(f"{target}: {name} has {leaf}, which is out of range")


@functools.cache
def _limited(target: torch._ops.OpOverload) -> list[tuple[int, str, Any]]:
    """The arguments that `check` looks at: their positions and names; their type, if it is none of numbers and tensors,
    else ``scale`` of a resizing, ``dilation``, or ``size``."""
    found: list[tuple[int, str, Any]] = []
    for position, argument in enumerate(target._schema.arguments):
        kind = str(argument.real_type)
        kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
        if kind in _TYPES:
            found.append((position, argument.name, _TYPES[kind]))
        elif not kind.startswith(_PLAIN):
            found.append((position, argument.name, ()))  # only None is one
        elif argument.name in _GEOMETRY:
            found.append((position, argument.name, "dilation" if argument.name == "dilation" else "size"))
        elif "upsample" in str(target) and _SCALES.match(argument.name):
            found.append((position, argument.name, "scale"))
    return found


def _check_function(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Sizes are numbers: no list is repeated, and powers are small."""
    if kwargs or not all(isinstance(value, (fx.Node, bool, int, float)) for value in args):
        raise ValueError(f"{target.__name__} takes results of other calls and numbers")
    if target is operator.getitem and not (len(args) == 2 and isinstance(args[0], fx.Node) and type(args[1]) is int):
        raise ValueError("getitem takes the results of another call and a number")
    if target is operator.pow and not (len(args) == 2 and type(args[1]) is int and 0 <= args[1] <= 8):
        raise ValueError("pow takes a number from 0 to 8 as its exponent")

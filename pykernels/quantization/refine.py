"""Layer by layer, choose int8 weights and biases that best reproduce what the fp32 network computes.

Rounding each weight to its nearest int8 value minimises the error of the weights; what matters is the error of the
layer's result. For ``y = W x + b`` with the layer's real inputs, one pass through the network does, for each layer:

1. *rounding with compensation* (GPTQ: Frantar et al. 2022, after Optimal Brain Surgeon): weights are rounded one input
   at a time and the error of each is made up for by the weights not rounded yet, weighed by the inputs' covariance;
2. *bias correction* (`bias`): each output channel is moved to where it comes nearest to the fp32 network's.

Inputs are those the *quantized* network sees, corrected layers before it included; the aim is what the fp32 network
computes for the same samples, so a layer also makes up for some of the error it inherits.

Time and memory of step 1 grow with the cube and the square of the number of terms in a layer's sums, so both are
bounded, by counts made from shapes (two machines choose alike): a layer beyond `ROOM` or `WORK` is rounded in parts, in
each of which errors are made up for among its own inputs; one for which that is not enough keeps the nearest values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from pykernels.graph.nodes import argument, constant, is_call
from pykernels.graph.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE
from pykernels.ops._sizes import spread

from .bias import add_to_bias, bias_shift, curve_behind

CONVOLUTIONS = ("aten.conv1d", "aten.conv2d")
LAYERS = (*CONVOLUTIONS, "aten.linear")

# Told (stage, done, total) after each step of a stage, and done = 0 at first.
Progress = Callable[[str, int, int], None]

MEMORY = 2 << 30  # bytes of activations kept at once, about
ROOM = 1 << 30  # bytes that rounding with compensation may take beside the model and its activations
WORK = 1 << 39  # multiplications that it may take for one layer,
TOTAL_WORK = 1 << 44  # and for all layers together
SMALLEST_PART = 128  # inputs; among fewer there is too little to make up for an error with
MAX_SAMPLES = 48
MIN_SAMPLES = 8
DAMPING = 0.01  # of the mean variance of the inputs, added to each variance
BLOCK = 16  # weights rounded between two updates of the rest: their rows fit the cache, and no thread need wait
FEW = 4  # with so many times fewer samples than values, samples stand for their covariance


def float_weights(model: GraphModule) -> dict[str, torch.Tensor]:
    """The constant weight of every convolution and linear of a prepared (not yet converted) graph, by node name."""
    weights = {}
    for node in model.graph.nodes:
        if is_call(node, *LAYERS):
            source = node.args[1]
            while isinstance(source, Node) and source.op == "call_module":  # the weight's observer
                source = source.args[0]
            weight = constant(model, source)
            if weight is not None:
                weights[node.name] = weight.clone()
    return weights


@dataclass
class Refinement:
    """What `refine` did, by node name.

    Attributes:
        refined: layers whose weights were rounded with compensation and whose biases were corrected.
        in_parts: of these, the ones too large to be rounded as a whole, with the number of parts.
        unrefined: layers whose biases alone were corrected, with the reason; their weights keep the nearest values.
    """

    refined: list[str] = field(default_factory=list)
    in_parts: dict[str, int] = field(default_factory=dict)
    unrefined: dict[str, str] = field(default_factory=dict)


def refine(
    model: GraphModule,
    weights: dict[str, torch.Tensor],
    samples: Sequence[tuple[Any, ...]],
    progress: Progress | None = None,
) -> Refinement:
    """Replace int8 weights and biases of a converted graph, in place; tells what became of each layer.

    Args:
        model: the result of ``convert_pt2e``: int8 weights in buffers behind ``dequantize_per_channel``.
        weights: the fp32 weights by node name, from :func:`float_weights` before the conversion.
        samples: calibration inputs, each a tuple of the network's inputs; as many are used as memory allows.
        progress: called as ``progress("refining", done, total)`` with the number of layers, first with 0.
    """
    with torch.no_grad():
        done = _Reconstruction(model, weights).run(samples, progress)
    model.recompile()
    return done


class _Reconstruction:
    """Runs the network once, node by node, on all samples: the fp32 network and the quantized one side by side.

    ``exact`` and ``inexact`` hold a node's value in either, as a list with one entry for each batch of samples.
    """

    def __init__(self, model: GraphModule, weights: dict[str, torch.Tensor]) -> None:
        self.model = model
        self.weights = weights
        self.exact: dict[Node, list[Any]] = {}
        self.inexact: dict[Node, list[Any]] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.done = Refinement()
        self.work = 0  # multiplications so far

    def run(self, samples: Sequence[tuple[Any, ...]], progress: Progress | None) -> Refinement:
        nodes = list(self.model.graph.nodes)
        reads = {node: node.all_input_nodes for node in nodes}
        last_use = {used: node for node in nodes for used in reads[node]}
        batches = self._fitting(samples)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        refinable = {node for node in nodes if self._refinable(node)}
        if progress is not None:
            progress("refining", 0, len(refinable))
        for node in nodes:
            if node.op == "output":
                break
            if node in placeholders:
                self.exact[node] = self.inexact[node] = [batch[placeholders.index(node)] for batch in batches]
                continue
            if node in refinable:
                self._refine(node, len(batches))
                if progress is not None:
                    progress("refining", len(self.done.refined) + len(self.done.unrefined), len(refinable))
            else:
                self._compute(node, len(batches))
            for used in reads[node]:
                if last_use[used] is node:
                    self.exact.pop(used, None), self.inexact.pop(used, None)
        return self.done

    def _fitting(self, samples: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """About as many batches as fit in memory, judged by the largest values of the graph."""
        largest = 1
        for node in self.model.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and node.op == "call_function" and value.ndim > 1:
                largest = max(largest, _elements_of_one(value))
        # An inverted residual block holds about three large values at a time, in each of the two networks.
        limit = min(MAX_SAMPLES, max(MIN_SAMPLES, MEMORY // (4 * 6 * largest)))
        # Data may be sorted: what is used is spread over all of it.
        rows = sum(_rows(sample) for sample in samples)
        entries = min(len(samples), max(1, round(limit * len(samples) / rows)))
        return [samples[i * len(samples) // entries] for i in range(entries)]

    def _refinable(self, node: Node) -> bool:
        if node.name not in self.weights or not is_call(node.args[1], DEQUANTIZE_CHANNEL):
            return False
        stored = node.args[1].args[0]
        return constant(self.model, stored) is not None and len(stored.users) == 1 and len(node.args[1].users) == 1

    def _compute(self, node: Node, count: int) -> None:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.model)
            self.exact[node] = self.inexact[node] = [value] * count
            return
        if all(self._refinable(user) and user.args[1] is node for user in node.users):
            return  # a weight about to be rounded anew
        function = self.model.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        if is_call(node, DEQUANTIZE_CHANNEL):
            self.exact[node] = self.inexact[node] = [_call(function, node, self.exact, 0)] * count
            return
        if is_call(node, QUANTIZE, DEQUANTIZE):  # the fp32 network has none
            self.exact[node] = self.exact[node.args[0]]
        else:
            self.exact[node] = [_call(function, node, self.exact, i) for i in range(count)]
        self.inexact[node] = [_call(function, node, self.inexact, i) for i in range(count)]

    def _refine(self, node: Node, count: int) -> None:
        """Round the weight of a convolution or linear anew, then correct its bias; computes the node's values."""
        dequantize = node.args[1]
        weight, scale = self.weights[node.name], constant(self.model, dequantize.args[1])
        stored = operator.attrgetter(str(dequantize.args[0].target))(self.model)
        self._round(_Layer(node, weight, self.inexact[node.args[0]]), scale, stored)
        in_effect = stored.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))

        channel = 1 if is_call(node, *CONVOLUTIONS) else -1

        def apply(inputs: list[Any], kernel: torch.Tensor) -> list[torch.Tensor]:
            return [node.target(inputs[i], kernel, *self._rest(node, i), **node.kwargs) for i in range(count)]

        exact = apply(self.exact[node.args[0]], weight)
        inexact = apply(self.inexact[node.args[0]], in_effect)
        shift = bias_shift(exact, inexact, channel, curve_behind(node))
        add_to_bias(self.model, node, shift)
        shape = [1] * exact[0].ndim
        shape[channel] = -1
        self.exact[node] = exact
        self.inexact[node] = [value.add_(shift.reshape(shape)) for value in inexact]

    def _round(self, layer: _Layer, scale: torch.Tensor, stored: torch.Tensor) -> None:
        """Round with compensation into ``stored``, which holds the nearest values, if the bounds allow."""
        name = layer.node.name
        try:
            parts, work = layer.divided(TOTAL_WORK - self.work)
        except _TooLarge as reason:
            self.done.unrefined[name] = str(reason)
            return
        self.work += work
        codes = stored.reshape(layer.groups, -1, layer.channels * layer.taps)
        for part in parts:
            at = (part.groups, slice(None), layer.inputs_of(part))
            codes[at] = layer.round(part, scale, self.generator).to(torch.int8)
        stored.copy_(codes.reshape(stored.shape))
        self.done.refined.append(name)
        if len(parts) > 1:
            self.done.in_parts[name] = len(parts)

    def _rest(self, node: Node, batch: int) -> list[Any]:
        """Arguments after the weight; the bias is the same in both networks until it is corrected."""
        return [torch.fx.map_arg(a, lambda n: self.exact[n][batch]) for a in node.args[2:]]


def round_with_compensation(weight: torch.Tensor, covariance: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """GPTQ: the int8 values (as fp32) of ``weight`` that least disturb its products with inputs of this covariance.

    With C = R R', R upper triangular, and e the errors of the weights rounded so far, the disturbance e' C e grows no
    more when the k-th weight goes to w_k - sum_{j<k} e_j R_jk / R_kk: that is the value to round.

    Args:
        weight: fp32 [groups, N, K]: each group's rows; N output channels of K inputs.
        covariance: fp32 or fp64 [groups, K, K] of the inputs (any positive factor).
        scale: fp32 [groups * N], one for each row.

    Returns:
        fp32 [groups, N, K] of integers in [-127, 127].
    """
    groups, rows, size = weight.shape
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    order, damping = _order_and_damping(variance)
    covariance = covariance.gather(1, order[:, :, None].expand(-1, -1, size)).double()
    covariance = covariance.gather(2, order[:, None, :].expand(-1, size, -1))
    covariance.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    covariance = covariance.flip(1, 2)
    factor = torch.linalg.cholesky(covariance)
    del covariance  # the largest values there are: at most two at a time
    factor = factor.flip(1, 2)
    influence = factor.div_(factor.diagonal(dim1=-2, dim2=-1)[:, None, :].clone()).float()
    del factor

    real, step = _columns(weight, order), scale.float().reshape(groups, rows)
    wanted, codes = real.clone(), torch.empty_like(real)
    for at in _slices(size, BLOCK):
        codes[:, at], errors = _round_block(wanted[:, at], real[:, at], influence[:, at, at], step)
        wanted[:, at.stop :].baddbmm_(influence[:, at, at.stop :].transpose(1, 2), errors, alpha=-1)
    return _in_place(codes, order)


def round_with_few_inputs(
    weight: torch.Tensor, variance: torch.Tensor, inputs: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """`round_with_compensation` for the covariance ``diag(variance) + inputs' inputs`` of few, but long, ``inputs``.

    The same answer for K r^2 + K r N instead of K^3 + K^2 N operations, and no K x K matrix: what the rounded weights
    leave for the others to make up for is seen only through its r products with the inputs.

    Args:
        weight: fp32 [groups, N, K].
        variance: fp32 [groups, K].
        inputs: fp32 [groups, r, K].
        scale: fp32 [groups * N].
    """
    groups, rows, size = weight.shape
    order, damping = _order_and_damping(variance + inputs.square().sum(1))
    rank = inputs.shape[1]
    alone = (variance.double() + damping[:, None]).gather(1, order)
    seen = inputs.gather(2, order[:, None, :].expand(-1, rank, -1)).transpose(1, 2).double().contiguous()  # [G, K, r]
    # Of the weights from k on, P = (1 + sum_j v_j v_j' / d_j)^-1 (Sherman-Morrison, from the end), and the k-th of them
    # answers a disturbance s with -v_k' P s / d_k.
    answer = torch.empty_like(seen)
    inverse = torch.eye(rank, dtype=torch.float64, device=weight.device).expand(groups, -1, -1).contiguous()
    for k in reversed(range(size)):
        moved = (inverse @ seen[:, k, :, None])[..., 0]
        answer[:, k] = moved / (alone[:, k] + (moved * seen[:, k]).sum(-1))[:, None]
        inverse -= moved[:, :, None] * answer[:, k, None, :]

    real, step = _columns(weight, order), scale.float().reshape(groups, rows)
    seen, answer = seen.float(), answer.float()
    disturbance, codes = real.new_zeros(groups, rank, rows), torch.empty_like(real)
    for at in _slices(size, BLOCK):
        wanted = torch.baddbmm(real[:, at], answer[:, at], disturbance, alpha=-1)
        influence = seen[:, at] @ answer[:, at].transpose(1, 2)
        codes[:, at], errors = _round_block(wanted, real[:, at], influence, step)
        disturbance.baddbmm_(seen[:, at].transpose(1, 2), errors)
    return _in_place(codes, order)


def _order_and_damping(variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that vary most are rounded first, while many others can still make up for the error: [G, K] and [G]."""
    return variance.argsort(dim=-1, descending=True), (DAMPING * variance.double().mean(-1)).clamp_min(1e-12)


def _columns(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[groups, N, K] -> [groups, K, N] in the order of rounding: what is rounded together lies together."""
    return weight.transpose(1, 2).gather(1, order[:, :, None].expand(-1, -1, weight.shape[1]))


def _in_place(codes: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Undo `_columns`."""
    back = torch.empty_like(codes).scatter_(1, order[:, :, None].expand_as(codes), codes)
    return back.transpose(1, 2).contiguous()


def _round_block(
    wanted: torch.Tensor, real: torch.Tensor, influence: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``wanted`` [G, B, N], each value moved by the errors before it; the codes, and their errors to ``real``."""
    codes, errors = torch.empty_like(real), torch.empty_like(real)
    for k in range(real.shape[1]):
        torch.round(wanted[:, k] / step, out=codes[:, k]).clamp_(-127, 127)
        torch.sub(codes[:, k] * step, real[:, k], out=errors[:, k])
        wanted[:, k + 1 :].addcmul_(influence[:, k, k + 1 :, None], errors[:, k, None], value=-1)
    return codes, errors


class _TooLarge(Exception):
    """Why a layer is not rounded with compensation."""


class _Part(NamedTuple):
    """What is rounded together: of these groups each, the weights of these of its channels."""

    groups: slice
    channels: slice


class _Layer:
    """A convolution or linear as ``y = W x`` of each of its groups, and samples of x: its inputs or receptive fields.

    A group has ``rows`` outputs of ``channels * taps`` inputs.
    """

    def __init__(self, node: Node, weight: torch.Tensor, values: list[torch.Tensor]) -> None:
        self.node = node
        self.weight = weight
        self.values = values
        self.linear = is_call(node, "aten.linear")
        self.groups = 1 if self.linear else int(argument(node, "groups"))
        self.rows = weight.shape[0] // self.groups
        self.channels = weight.shape[1]
        self.taps = weight[0, 0].numel()

    def inputs_of(self, part: _Part) -> slice:
        """Which columns of W the part has."""
        return slice(part.channels.start * self.taps, part.channels.stop * self.taps)

    def divided(self, allowed: int) -> tuple[list[_Part], int]:
        """The fewest parts that `ROOM`, `WORK` and the ``allowed`` multiplications permit, and what these come to.

        Raises `_TooLarge` when there are none.
        """
        for width in _shares(self.channels):
            if width < self.channels and width * self.taps < SMALLEST_PART:
                break
            room, work = self._cost(width * self.taps)
            work *= self.groups * -(-self.channels // width)
            if room <= ROOM and work <= min(WORK, allowed):
                together = next(n for n in _shares(self.groups) if n * room <= ROOM)
                slices = _slices(self.groups, together), _slices(self.channels, width)
                return [_Part(g, c) for g in slices[0] for c in slices[1]], work
        if room <= ROOM and work <= WORK:
            raise _TooLarge("the layers before it took the time that there is for rounding with compensation")
        limit = "memory" if room > ROOM else "time"
        size = self.channels * self.taps
        raise _TooLarge(f"{self.rows} sums of {size} terms take too much {limit} to be rounded with compensation")

    def _cost(self, size: int) -> tuple[int, int]:
        """Bytes and multiplications, about, for ``size`` inputs of one group."""
        positions = _wanted(size)
        if self.linear:
            positions = min(positions, sum(value.numel() // value.shape[-1] for value in self.values))
        if _few(positions, size):
            return 32 * positions * (size + positions), positions * size * (4 * positions + self.rows)
        sampled, factored = 12 * positions * size + 4 * size**2, 20 * size**2 + 16 * size * self.rows
        return max(sampled, factored), size**2 * (positions + size + self.rows)

    def _samples(self, part: _Part, generator: torch.Generator) -> torch.Tensor:
        """Input vectors of the part, about their mean: [groups, positions, inputs]."""
        size = (part.channels.stop - part.channels.start) * self.taps
        each = -(-_wanted(size) // len(self.values))
        picked = []
        for value in self.values:
            if self.linear:
                rows = value.reshape(-1, value.shape[-1])
                picked.append(rows[torch.randperm(len(rows), generator=generator)[:each], part.channels])
            else:
                channels = value.unflatten(1, (self.groups, -1))[:, part.groups, part.channels].flatten(1, 2)
                picked.append(_patches(self.node, self.weight, channels, each, generator))
        inputs = torch.cat(picked).reshape(-1, part.groups.stop - part.groups.start, size)
        del picked
        return (inputs - inputs.mean(0)).transpose(0, 1)

    def round(self, part: _Part, scale: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The int8 values of a part of the weight, fp32 [groups, rows, inputs], by its inputs' covariance.

        (A shift of the mean is the bias's to correct.) Of few samples no covariance can be learned: it is shrunk
        towards its diagonal by K / (K + positions), so that rounding falls back to the nearest value instead of fitting
        the samples.
        """
        rows = self.weight.reshape(self.groups, self.rows, -1)[part.groups, :, self.inputs_of(part)]
        scale = scale.reshape(self.groups, self.rows)[part.groups]
        samples = self._samples(part, generator)
        positions, size = samples.shape[1:]
        variance = samples.square().mean(1)
        kept = positions / (positions + size)
        if _few(positions, size):
            return round_with_few_inputs(rows, variance * (1 - kept), samples * (kept / positions) ** 0.5, scale)
        covariance = [_products(samples).mul_(kept / positions)]
        covariance[0].diagonal(dim1=1, dim2=2).add_(variance * (1 - kept))
        del samples
        return round_with_compensation(rows, covariance.pop(), scale)  # whose memory is then free for what follows


def _wanted(size: int) -> int:
    """Positions to look at for rows of ``size`` inputs: several for each where that is quick."""
    return max(1024, size, min(3 * size, 4096))


def _few(positions: int, size: int) -> bool:
    return positions * FEW <= size


def _shares(count: int) -> list[int]:
    """How many of ``count`` are together when they are dealt out to one, two, three ... as evenly as can be."""
    return sorted({-(-count // parts) for parts in range(1, count + 1)}, reverse=True)


def _slices(count: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def _products(x: torch.Tensor) -> torch.Tensor:
    """``x' x`` of [G, P, K], each product once: [G, K, K]."""
    groups, _, size = x.shape
    products = x.new_empty(groups, size, size)
    for start in range(0, size, 512):
        stop = min(start + 512, size)
        products[:, start:stop, start:] = x[:, :, start:stop].transpose(1, 2) @ x[:, :, start:]
        products[:, stop:, start:stop] = products[:, start:stop, stop:].transpose(1, 2)
    return products


def _patches(
    node: Node, weight: torch.Tensor, value: torch.Tensor, wanted: int, generator: torch.Generator
) -> torch.Tensor:
    """``wanted`` random receptive fields of a convolution: [positions, C, taps]."""
    kernel = list(weight.shape[2:])
    spatial = len(kernel)
    stride, padding, dilation = (argument(node, name) for name in ("stride", "padding", "dilation"))
    stride, dilation = spread(stride, spatial), spread(dilation, spatial)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        before = [r // 2 if padding == "same" else 0 for r in reach]
        after = [r - b if padding == "same" else 0 for r, b in zip(reach, before, strict=True)]
    else:
        before = after = spread(padding, spatial)
    value = F.pad(value, [p for pair in zip(before[::-1], after[::-1], strict=True) for p in pair]).contiguous()
    places = [(s - r - 1) // t + 1 for s, r, t in zip(value.shape[2:], reach, stride, strict=True)]
    strides = value.stride()
    windows = value.as_strided(
        (*value.shape[:2], *kernel, *places),
        (
            *strides[:2],
            *(s * d for s, d in zip(strides[2:], dilation, strict=True)),
            *(s * t for s, t in zip(strides[2:], stride, strict=True)),
        ),
    )
    # Batch and places first, so that one index picks whole receptive fields.
    windows = windows.permute(0, *range(2 + spatial, 2 + 2 * spatial), 1, *range(2, 2 + spatial))
    at = [torch.randint(size, (wanted,), generator=generator) for size in windows.shape[: 1 + spatial]]
    return windows[tuple(at)].flatten(2)


def _call(function: Callable[..., Any], node: Node, values: dict[Node, list[Any]], batch: int) -> Any:
    arguments = torch.fx.map_arg((node.args, node.kwargs), lambda n: values[n][batch])
    return function(*arguments[0], **arguments[1])


def _rows(sample: tuple[Any, ...]) -> int:
    first = next((x for x in sample if isinstance(x, torch.Tensor) and x.dim()), None)
    return 1 if first is None else max(1, first.shape[0])


def _elements_of_one(value: torch.Tensor) -> int:
    """Elements of one sample's share of a value: everything but the first dimension."""
    elements = 1
    for size in value.shape[1:]:
        elements *= size if isinstance(size, int) else size.node.hint or 1  # of a free size the example's
    return elements

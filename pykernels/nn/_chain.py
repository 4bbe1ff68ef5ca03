"""A layer with packed weights, and the batch norm and activation that it computes in the same pass.

The modules of this package *are* the modules of `torch.nn` (subclasses with the same parameters, names and hooks). In
training they run torch's own code. In evaluation the first module of a chain, the head, computes the whole chain with
one kernel on packed weights, and its followers hand their input on. Each module decides this for itself from the same
question, `Chain.ready`, so all of a chain always agree.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_post_hook

from pykernels.cuda import registry
from pykernels.graph.batch_norm import scale_and_shift
from pykernels.ops.dtypes import REALS, STORED

_PLAIN = (nn.Parameter, torch.Tensor)  # no subclass: what such a weight holds is its own affair
_STEPPED = "_pykernels_stepped"  # attribute of a parameter: see `_mark`
_ACTIVATED = "_pykernels_activated"  # attribute of a tensor: the shared activation that a head has applied to it


class Chain:
    """Head, norm (or None) and activation (or None): each alone reads the one before, and reads nothing else.

    An activation that is *shared* reads other values, too, perhaps of other chains (the one ReLU object of a residual
    block). It hands on only the very tensor that a head has marked. A lost mark costs time and no correctness, since
    only activations are shared that change nothing the second time.

    Attributes:
        between: containers left or entered on the way from the head to its followers; a hook on one of them would see
            values inside the chain.
    """

    def __init__(
        self,
        head: Head,
        norm: Any = None,
        activation: Any = None,
        between: tuple[nn.Module, ...] = (),
        shared: bool = False,
    ) -> None:
        self.head = head
        self.norm = norm
        self.activation = activation
        self.between = between
        self.shared = shared

    @property
    def followers(self) -> tuple[nn.Module, ...]:
        """The norm and the activation that there are."""
        return tuple(module for module in (self.norm, self.activation) if module is not None)

    @property
    def members(self) -> tuple[Any, ...]:
        """The head and the followers that belong to this chain alone."""
        return (self.head, *(self.followers[:-1] if self.shared else self.followers))

    def ready(self, x: torch.Tensor) -> bool:
        """Whether the head computes the whole chain for `x`, the input of any of its modules.

        Not so in training, under autocast (whose choice of dtypes then holds), where our ops do not run, in other
        dtypes than float32, bfloat16 and float16, when a hook watches the values between the modules, and while other
        code traces or transforms.
        """
        if not isinstance(x, torch.Tensor) or registry.complaint(x.device) is not None:
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False
        head = self.head
        weight = head.weight
        if x.device != weight.device or x.dtype != weight.dtype or x.dtype not in REALS or x.dim() not in head.ranks:
            return False
        if head.training:
            return False
        followers = self.followers
        for module in followers:
            if module.training or _watched(module, inputs=True):
                return False
        if followers:
            if _watched(head, inputs=False):
                return False
            for module in self.between:
                if _watched(module, inputs=True):
                    return False
        if torch.compiler.is_compiling():
            return head.packed is not None and (torch.compiler.is_exporting() or not self.needs_gradient(x))
        return type(weight) in _PLAIN and not torch._C._are_functorch_transforms_active()

    def needs_gradient(self, x: torch.Tensor) -> bool:
        """Whether autograd records what is done with `x` and the chain's parameters."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(t is not None and t.requires_grad for t in self.parameters())

    def parameters(self) -> tuple[torch.Tensor | None, ...]:
        """weight, bias, gamma, beta, running mean, running variance."""
        norm = self.norm
        affine = (None,) * 4 if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return (self.head.weight, self.head.bias, *affine)

    def plain(self, x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
        """The chain in torch, differentiable, with the given `parameters`."""
        weight, bias, gamma, beta, mean, var = parameters
        assert weight is not None
        y = self.head.plain(x, weight, bias)
        if self.norm is not None:
            y = nn.functional.batch_norm(y, mean, var, gamma, beta, False, 0.0, self.norm.eps)
        return y if self.activation is None else self.activation.plain(y)

    def folded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias with the batch norm in them: w a, (b - mean) a + beta, a = gamma rsqrt(var + eps), fp64."""
        weight, bias, gamma, beta, mean, var = (None if t is None else t.detach() for t in self.parameters())
        assert weight is not None
        if self.norm is None:
            return weight, bias
        assert mean is not None and var is not None
        scale, shift = scale_and_shift(mean, var, self.norm.eps, gamma, beta)
        if bias is not None:
            shift = shift + bias.double() * scale
        return (weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype), shift.to(weight.dtype)


def _watched(module: nn.Module, inputs: bool) -> bool:
    """Whether a hook sees the module's output (or, with `inputs`, its input), or its forward was replaced."""
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__:
        return True
    return inputs and bool(module._forward_pre_hooks)


class Member(nn.Module):
    """What every module of a chain does: it tells the head when weights may have changed."""

    original: ClassVar[type[nn.Module]]  # the class of torch.nn that this one stands for
    chain: Any = None  # a Chain (a name to mypy would be one of a Tensor or a Module); None for a shared activation

    def train(self, mode: bool = True) -> Any:
        """As in torch; `eval()` packs the weights anew."""
        changed = self.training != mode
        super().train(mode)
        if self.chain is not None and (changed or self is self.chain.members[-1]):  # once, not once a module
            self.chain.head.refresh()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.chain is not None:
            self.chain.head.refresh()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.chain is not None:
            self.chain.head.refresh()


class Head(Member):
    """A layer whose weights are packed for a kernel, together with its followers.

    Packed weights are kept in a plain attribute, no buffer, so that `state_dict`, `buffers()` and what synchronizes
    them stay as they were. They are packed again when a tensor they came from was replaced or changed in place (its
    data pointer or version differs), when an optimizer that holds one has stepped, and whenever the module enters
    evaluation, is moved or is loaded. A compiled program cannot look at versions: it reads the packed weights as they
    are, which every event of the second kind renews in place.
    """

    ranks: ClassVar[tuple[int, ...]]
    precisions: ClassVar[tuple[str, ...]] = ("fp32", *STORED)
    precision: str = "fp32"
    packed: torch.Tensor | None = None
    _key: tuple[Any, ...] | None = None
    _sources: tuple[torch.Tensor, ...] = ()  # kept alive so that no new tensor can come to stand at the same address

    weight: torch.Tensor
    bias: Any  # Tensor or None, which torch's own layers annotate in different ways

    def join(self, chain: Chain, precision: str = "fp32") -> None:
        """Become the head of `chain`, whose followers are `Member`s already."""
        if precision not in self.precisions:
            raise ValueError(f"precision must be one of {', '.join(self.precisions)}, not '{precision}'")
        self.precision = precision
        for module in chain.members:
            module.chain = chain
        self.refresh()

    def stored(self, t: torch.Tensor) -> torch.Tensor:
        """Weights or input in the dtype that the precision multiplies."""
        dtype = STORED.get(self.precision, t.dtype)
        return t if t.dtype == dtype else t.to(dtype)

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Pack folded weights for `run`."""
        raise NotImplementedError

    def run(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """The whole chain on packed weights."""
        raise NotImplementedError

    def plain(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The head alone in torch."""
        raise NotImplementedError

    @property
    def activation_name(self) -> str:
        """The kernels' name of the chain's activation."""
        return "none" if self.chain.activation is None else self.chain.activation.kernel_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In evaluation the whole chain with one kernel, else this layer as torch has it."""
        chain = self.chain
        if not chain.ready(x):
            return super().forward(x)
        if torch.compiler.is_compiling():
            assert self.packed is not None
            return self.run(x, self.packed)
        packed = self.current()
        if chain.needs_gradient(x):
            y = _Differentiable.apply(chain, packed, x, *chain.parameters())
        else:
            y = self.run(x, packed)
        if chain.shared:
            setattr(y, _ACTIVATED, chain.activation)
        return y

    def current(self) -> torch.Tensor:
        """Packed weights that match the parameters and statistics of this moment."""
        sources = [t for t in self.chain.parameters() if t is not None]
        norm = self.chain.norm
        if norm is not None and norm.num_batches_tracked is not None:
            sources.append(norm.num_batches_tracked)  # counts updates of the statistics, which bump no version
        marks = [_mark(t) for t in sources if t.requires_grad or isinstance(t, nn.Parameter)]
        key = (_subclass_stepped, *marks, *((t.data_ptr(), _version(t), t.stride()) for t in sources))
        if key != self._key or self.packed is None:
            self._pack()
            self._key = key
            self._sources = tuple(t.detach() for t in sources)
        assert self.packed is not None
        return self.packed

    def refresh(self) -> None:
        """Pack anew if the chain is in evaluation and its weights are ones that a kernel takes; else forget the key."""
        self._key = None
        if any(module.training for module in self.chain.members):
            return
        tensors = [t for t in self.chain.parameters() if t is not None]
        device = self.weight.device
        here = all(type(t) in _PLAIN and t.device == device and t.dtype in REALS for t in tensors)
        if here and registry.complaint(device) is None:
            self.current()
        else:
            self.packed, self._sources = None, ()

    def _pack(self) -> None:
        # Normal tensors even when the first call stands under inference_mode: they outlive it.
        with torch.inference_mode(False), torch.no_grad():
            packed = self.pack(*self.chain.folded())
            known = self.packed
            if known is not None and known.shape == packed.shape and known.device == packed.device:
                known.copy_(packed)
            else:
                self.packed = packed

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the packed weights but check them again at their first call."""
        state = dict(self.__dict__)
        state.pop("_key", None)
        state.pop("_sources", None)
        return state


class Follower(Member):
    """A batch norm or an activation that the head computes in evaluation: then it hands its input on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Its input where the head has done the work, else as torch has it."""
        done = self._marked(x) if self.chain is None else self.chain.ready(x)
        return x if done else super().forward(x)

    def _marked(self, x: torch.Tensor) -> bool:
        if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor):
            return False
        return x.__dict__.pop(_ACTIVATED, None) is self

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The module as torch has it."""
        return super().forward(x)


class _Differentiable(torch.autograd.Function):
    """The kernel forward; backward computes the chain again in torch and differentiates that.

    For int8 this is the straight-through gradient: that of the float chain at the same input.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, packed: torch.Tensor, x: torch.Tensor, *parameters: Any) -> torch.Tensor:
        ctx.chain = chain
        ctx.save_for_backward(x, *parameters)
        return chain.head.run(x, packed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()  # differentiated twice: then through the tensors themselves, not copies
        needs = ctx.needs_input_grad[2:]
        tensors = [
            t if t is None or again else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        with torch.enable_grad():
            y = ctx.chain.plain(*tensors)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needs))


_marks = itertools.count()
_subclass_stepped = next(_marks)


@_disable_dynamo  # for a compiled step; torch.compiler.disable would import the compiler here and now, for seconds
def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After every optimizer's step: the fused ones change parameters without a new version, so these get new marks.

    What other tensors a subclass changes (a shard, a flat parameter) is its own affair: its step changes all marks.
    """
    global _subclass_stepped
    for group in optimizer.param_groups:
        for t in group["params"]:
            if type(t) not in _PLAIN:
                _subclass_stepped = next(_marks)
            elif _STEPPED in t.__dict__:
                t.__dict__[_STEPPED] = next(_marks)


register_optimizer_step_post_hook(_note_step)


def _mark(t: torch.Tensor) -> int:
    """A number that no other tensor has, and that `t` has until an optimizer that holds `t` steps.

    It lies on the tensor: it dies with it, serves all heads that share it, and stands in the way of no swap of tensors
    (as a weak reference would). Two threads that hand one out at once pack once more than needed.
    """
    mark = t.__dict__.get(_STEPPED)
    if mark is None:
        mark = t.__dict__[_STEPPED] = next(_marks)
    return int(mark)


def _version(t: torch.Tensor) -> Any:
    # Inference tensors count no versions: an object equal to no other makes their weights be packed at every call.
    return object() if t.is_inference() else t._version

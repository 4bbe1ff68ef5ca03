"""Which modules of a model follow each other: proved by tracing `forward` symbolically (torch.fx), never guessed.

A module's forward proves what it traces to. Where a forward cannot be traced (it branches on values or shapes), its
children are traced one by one, and nothing is proved of how it joins them; `nn.Sequential` is the common child that can
be. That a module is called through its forward, and that no code reaches past it for its children, is taken for
granted.

Nothing is run and the model is not touched: what is traced is a shadow of it, module objects with the same parameters.
"""

from __future__ import annotations

import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from pykernels.ops.errors import reason

__all__ = ["Adjacency", "adjacency"]

_MOST_VARIANTS = 8


@dataclass(frozen=True)
class _Call:
    """One call of a module: which module alone makes its input, which alone reads its output, what lies between."""

    reads: int | None
    read_by: int | None
    crossed: frozenset[int]  # the containers left or entered on the way to the reader


@dataclass
class Adjacency:
    """What is proved. Modules are known by `id`.

    Attributes:
        calls: every call found of every module.
        opaque: names of the modules whose forward cannot be traced, with the reason.
    """

    calls: dict[int, list[_Call]] = field(default_factory=lambda: defaultdict(list))
    opaque: dict[str, str] = field(default_factory=dict)
    opaque_children: set[int] = field(default_factory=set)

    def reader(self, module: nn.Module) -> int | None:
        """The id of the module that alone reads every output of `module`; None without one."""
        if id(module) in self.opaque_children:
            return None
        readers = {call.read_by for call in self.calls.get(id(module), ())}
        reader = readers.pop() if len(readers) == 1 else None
        return None if reader in self.opaque_children else reader

    def follower(self, module: nn.Module) -> int | None:
        """The `reader` of `module` when it reads nothing else, else None."""
        reader = self.reader(module)
        if reader is None or any(call.reads != id(module) for call in self.calls.get(reader, ())):
            return None
        return reader

    def between(self, module: nn.Module) -> set[int]:
        """The containers left or entered between a module and its `reader`."""
        return {container for call in self.calls[id(module)] for container in call.crossed}


def adjacency(model: nn.Module) -> Adjacency:
    """Find out which modules of `model`, in evaluation, follow each other."""
    found = Adjacency()
    originals: dict[int, nn.Module] = {}
    root = _shadow(model, {}, originals)
    names = {id(module): name for name, module in root.named_modules()}
    _prove(root, found, set(), originals, names)
    return found


def _prove(
    module: nn.Module, found: Adjacency, opaque: set[int], originals: dict[int, nn.Module], names: dict[int, str]
) -> None:
    if _is_torch_leaf(module):
        return
    calls, why = _attempt(module, opaque, originals)
    if calls is None:
        before, known = _copy(found.calls), len(opaque)
        for child in _children(module):
            if any(True for _ in child.children()):
                _prove(child, found, opaque, originals, names)
        if len(opaque) > known:  # now that the children which stood in the way are leaves
            calls, _ = _attempt(module, opaque, originals)
        if calls is None:
            opaque.add(id(module))
            found.opaque[names[id(module)]] = f"{type(originals[id(module)]).__name__}.forward: {why}"
            found.opaque_children.update(id(originals[id(child)]) for child in _children(module))
            return
        found.calls = before
    for key, value in calls.items():
        found.calls[key].extend(value)


def _attempt(
    module: nn.Module, opaque: set[int], originals: dict[int, nn.Module]
) -> tuple[dict[int, list[_Call]] | None, str]:
    """The calls that tracing `module` finds, or None and the reason, which goes into the report."""
    try:
        return _trace(module, opaque, originals), ""
    except Exception as error:  # a forward may fail in any way on a symbol instead of a tensor
        return None, reason(error)


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that the forward of `module` calls by itself: its children, those in lists and dictionaries, too."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child)
        else:
            yield child


def _copy(calls: dict[int, list[_Call]]) -> dict[int, list[_Call]]:
    copied: dict[int, list[_Call]] = defaultdict(list)
    copied.update({key: list(value) for key, value in calls.items()})
    return copied


def _trace(module: nn.Module, opaque: set[int], originals: dict[int, nn.Module]) -> dict[int, list[_Call]]:
    """The calls in every variant of the module's optional arguments, each a symbol or what it defaults to."""
    if "forward" in module.__dict__:
        raise ValueError("the object has a forward of its own")
    calls: dict[int, list[_Call]] = defaultdict(list)
    for concrete in _variants(module):
        tracer = _Tracer(opaque)
        graph = tracer.trace(module, concrete or None)
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            producer = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            reads = tracer.called.get(producer) if isinstance(producer, fx.Node) else None
            reader = next(iter(node.users)) if len(node.users) == 1 else None
            read_by, crossed = None, frozenset[int]()
            if reader is not None and reader.args == (node,) and not reader.kwargs and reader in tracer.called:
                read_by = tracer.called[reader]
                apart = set(tracer.where[node]) ^ set(tracer.where[reader])
                crossed = frozenset(id(originals[inner]) for _, inner in apart)
            call = _Call(
                None if reads is None else id(originals[reads]),
                None if read_by is None else id(originals[read_by]),
                crossed,
            )
            calls[id(originals[tracer.called[node]])].append(call)
    return calls


def _variants(module: nn.Module) -> Iterator[dict[str, Any]]:
    optional: list[tuple[str, list[tuple[bool, Any]]]] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        default = parameter.default
        if default is None:
            optional.append((parameter.name, [(False, None), (True, None)]))
        elif isinstance(default, bool):
            optional.append((parameter.name, [(True, False), (True, True)]))
    if 2 ** len(optional) > _MOST_VARIANTS:
        raise ValueError("forward has too many optional arguments to try")
    for choice in itertools.product(*(values for _, values in optional)):
        yield {name: value for (name, _), (fixed, value) in zip(optional, choice, strict=True) if fixed}


class _Tracer(fx.Tracer):
    """Notes the module and the enclosing calls of every module call, and runs no hooks."""

    proxy_buffer_attributes = True  # or reading a buffer would run operations on it

    def __init__(self, opaque: set[int]) -> None:
        super().__init__()
        self._opaque = opaque
        self._stack: tuple[tuple[int, int], ...] = ()
        self._serial = itertools.count()
        self.called: dict[fx.Node, int] = {}
        self.where: dict[fx.Node, tuple[tuple[int, int], ...]] = {}  # (serial number, id) of each enclosing call

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_torch_leaf(m) or id(m) in self._opaque:
            proxy = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            self.called[proxy.node] = id(m)
            self.where[proxy.node] = self._stack
            return proxy
        outer = self._stack
        self._stack = (*outer, (next(self._serial), id(m)))
        try:
            return m.forward(*args, **kwargs)
        finally:
            self._stack = outer


def _is_torch_leaf(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) and type(module) is not nn.Sequential


def _shadow(module: nn.Module, made: dict[int, nn.Module], originals: dict[int, nn.Module]) -> nn.Module:
    """A copy of the module objects alone, in evaluation, so that what a forward assigns to `self` stays in the copy."""
    if id(module) in made:
        return made[id(module)]
    copy: nn.Module = type(module).__new__(type(module))
    made[id(module)] = copy
    originals[id(copy)] = module
    for name, value in module.__dict__.items():
        copy.__dict__[name] = value.copy() if isinstance(value, dict | list | set) else value
    copy.__dict__["training"] = False
    copy.__dict__["_modules"] = {
        name: None if child is None else _shadow(child, made, originals) for name, child in module._modules.items()
    }
    # A plain attribute or list that holds a module must name its shadow, too.
    for name, value in copy.__dict__.items():
        if isinstance(value, nn.Module) and id(value) in made:
            copy.__dict__[name] = made[id(value)]
    return copy

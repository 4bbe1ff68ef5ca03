"""A network with plans, cut into parts that follow one another: each again a graph with plans, over its own weights.

The steps of all plans and the calls of torch's between them stand in one order, and a cut goes before any of them. What
was made before a cut and is read behind it crosses it, as it is stored: 8-bit values as their bytes. A part hands on
what only a later one reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from pykernels.network.buffers import ALIGNMENT, consolidate
from pykernels.network.plan.format import DTYPES, Program, Record, decode, encode, weights_of
from pykernels.network.plan.planned import WEIGHTS, Planned, places
from pykernels.network.plan.timing import call_seconds, record_seconds
from pykernels.ops.plan import describe_plan

aten = torch.ops.aten

__all__ = ["Cuts", "Part", "Size", "Spec"]

_PLAN = torch.ops.pykernels.run_plan.default
Key = tuple[fx.Node, int]  # a node of the graph and 0, or the call of a plan and the number of a value in it


class Size(NamedTuple):
    """A number, or so many times the product of some of the network's free sizes."""

    factor: int
    of: tuple[int, ...] = ()

    def at(self, free: Sequence[int]) -> int:
        return self.factor * math.prod(free[k] for k in self.of)


class Spec(NamedTuple):
    """A tensor that crosses a cut."""

    dtype: torch.dtype
    sizes: tuple[Size, ...]

    def bytes(self, free: Sequence[int]) -> int:
        return self.dtype.itemsize * math.prod(size.at(free) for size in self.sizes)


class Part(NamedTuple):
    """A part of a network.

    Attributes:
        program: from what crosses the cut before it to what crosses the one behind it.
        planned: the same over the memory of its constants; None where it has no plans.
        inputs: what it takes; of the first part, of the whole network.
        labels: of all its steps.
        calls: of torch's in it, by name.
    """

    program: fx.GraphModule
    planned: Planned | None
    inputs: list[Spec]
    labels: set[str]
    calls: list[str]


@dataclass
class _Unit:
    """A step of a plan, or a call of torch's."""

    node: fx.Node
    record: int | None
    reads: list[Key]
    makes: Key


class Cuts:
    """Where a network may be cut, and what that would cost.

    Args:
        planned: a network that writes into nothing.
        examples: flat inputs of calls: one, then one for each free size in which it alone differs, and any others.
        free: their free sizes.

    Attributes:
        count: of units; cuts are numbers between 0 and it, both of which are the network's ends.
    """

    def __init__(
        self, planned: Planned, examples: Sequence[Sequence[torch.Tensor]], free: Sequence[Sequence[int]]
    ) -> None:
        self._planned, self._examples, self._free = planned, examples, free
        self._graph = planned.program.graph
        self._values = [_values(planned, inputs) for inputs in examples]
        self._programs = {
            node: decode(_buffer(planned.program, node.args[0])) for node in self._graph.nodes if _is_plan(node)
        }
        self._alias: dict[fx.Node, Key] = {}
        self._units: list[_Unit] = []
        for node in self._graph.nodes:
            self._take(node)
        self._inputs = [(node, 0) for node in self._graph.nodes if node.op == "placeholder"]
        self._outputs = next(node for node in self._graph.nodes if node.op == "output").args[0]
        self.count = len(self._units)
        self._made = {key: 0 for key in self._inputs} | {unit.makes: i + 1 for i, unit in enumerate(self._units)}
        self._last = {key: place for place, unit in enumerate(self._units) for key in unit.reads}
        for node in self._outputs:
            if isinstance(node, fx.Node):
                self._last[self._alias[node]] = self.count
        self._specs: dict[Key, Spec | None] = {}
        self._needed = [set[int]()]  # by cut, from the last one: the free sizes that sizes behind it depend on
        for unit in reversed(self._units):
            self._needed.append(self._needed[-1] | self._sizes_of(unit))
        self._needed.reverse()

    def _sizes_of(self, unit: _Unit) -> set[int]:
        spec = self._spec(unit.makes)
        sizes = list(spec.sizes) if spec is not None else []
        if unit.record is None:
            sizes += [self._size_of(node) or Size(1) for node in unit.node.all_input_nodes if self._is_size(node)]
        return {k for size in sizes for k in size.of}

    def _take(self, node: fx.Node) -> None:
        """Note a node of the graph: what steps it has, and which value it stands for."""
        if _is_plan(node):
            program, given = self._programs[node], node.args[2]
            for number, record in enumerate(program.records):
                if record.kind != "constant":  # each part has those that it reads
                    reads = [key for value in record.inputs if (key := self._in_plan(node, value)) is not None]
                    self._units.append(_Unit(node, number, reads, (node, len(given) + number)))
        elif node.op == "placeholder":
            self._alias[node] = (node, 0)
        elif node.op == "call_function" and not self._is_size(node):
            source = node.args[0] if node.target is operator.getitem else None
            if isinstance(source, fx.Node) and _is_plan(source):
                self._alias[node] = (source, self._programs[source].outputs[node.args[1]][0])
                return
            reads = [self._alias[value] for value in node.all_input_nodes if value in self._alias]
            self._alias[node] = (node, 0)
            self._units.append(_Unit(node, None, reads, (node, 0)))

    def _in_plan(self, node: fx.Node, value: int) -> Key | None:
        """What a number of a plan stands for; None for a constant."""
        given: Any = node.args[2]
        if value < len(given):
            return self._alias[given[value]]
        return None if self._programs[node].records[value - len(given)].kind == "constant" else (node, value)

    def _is_size(self, node: fx.Node) -> bool:
        return type(self._values[0][node, 0]) is int

    # --- what crosses ---

    def crossing(self, cut: int) -> list[Key]:
        """The values made before a cut and read behind it; before the first unit, and behind the last, the network's
        own."""
        if cut == 0:
            return list(self._inputs)
        return [key for key, made in self._made.items() if made <= cut <= self._last.get(key, -1)]

    def specs(self, cut: int) -> list[Spec] | None:
        """Of what crosses a cut; None where it cannot go there: something is no tensor, a size is no product of free
        ones, or a free size that matters behind it does not show in what crosses."""
        found = [self._spec(key) for key in self.crossing(cut)]
        known = [spec for spec in found if spec is not None]
        if len(known) < len(found) or not found:
            return None
        shown = {size.of[0] for spec in known for size in spec.sizes if len(size.of) == 1}
        return known if self._needed[cut] <= shown else None

    def _spec(self, key: Key) -> Spec | None:
        if key not in self._specs:
            tensors = [values[key] for values in self._values]
            self._specs[key] = None
            if all(isinstance(tensor, torch.Tensor) for tensor in tensors):
                dims = [self._size([tensor.shape[d] for tensor in tensors]) for d in range(tensors[0].dim())]
                sizes = tuple(size for size in dims if size is not None)
                if len(sizes) == len(dims) <= 6:
                    self._specs[key] = Spec(tensors[0].dtype, sizes)
        return self._specs[key]

    def _size(self, found: Sequence[int]) -> Size | None:
        """A size that was seen in each of the calls."""
        first = self._free[0]
        of = tuple(k for k in range(len(first)) if found[1 + k] != found[0])
        size = Size(found[0] // math.prod(first[k] for k in of), of)
        right = all(size.at(free) == seen for free, seen in zip(self._free, found, strict=True))
        return size if right and (size.factor or not of) else None

    def _size_of(self, node: fx.Node) -> Size | None:
        return self._size([values[node, 0] for values in self._values])

    def seconds(self, rounds: int) -> list[float]:
        """Of each unit, with the first example: the quickest of `rounds`; what brings outputs into their layout counts
        with the last unit of its plan."""
        inputs = self._examples[0]
        plans, calls = record_seconds(self._planned, inputs, rounds), {}
        if any(unit.record is None for unit in self._units):
            calls = call_seconds(self._planned, inputs, rounds)
        found = []
        for place, unit in enumerate(self._units):
            if unit.record is None:
                found.append(calls[unit.node])
                continue
            *times, layout = plans[str(unit.node.args[0].target)]
            last = place + 1 == self.count or self._units[place + 1].node is not unit.node
            found.append(times[unit.record] + layout * last)
        return found

    def lies_last(self, key: Key) -> bool:
        """Whether a result of a plan's step is handed on channels_last: as the plan does, where it does, or as it
        lies."""
        (node, value), values = key, self._values[0]
        program, given = self._programs[node], [values[x, 0] for x in node.args[2]]
        for known, last in program.outputs:
            if known == value:
                return last
        if values[key].dim() != 4:
            return False
        steps = value - len(given) + 1
        alone = Program(program.weight_bytes, program.inputs, program.records[:steps], [(value, True)])
        drivers = describe_plan(encode(alone), self._planned.weights, given)["drivers"]
        return all(driver["step"] < steps for driver in drivers)  # else something brings it into that layout

    # --- parts ---

    def part(self, begin: int, end: int) -> Part:
        """The units from `begin` to before `end` as a network of its own.

        Raises:
            ValueError: it cannot be cut there.
        """
        if self.specs(begin) is None or (end < self.count and self.specs(end) is None):
            raise ValueError("the network cannot be cut there")
        return _Builder(self, begin, end).run()


class _Builder:
    """Makes the graph of a part."""

    def __init__(self, cuts: Cuts, begin: int, end: int) -> None:
        self.cuts, self.begin, self.end = cuts, begin, end
        self.root, self.graph = nn.Module(), fx.Graph()
        self.nodes: dict[Key, fx.Node] = {}
        self.inputs = cuts.crossing(begin)
        self.plans: dict[str, Program] = {}
        self.labels: dict[str, list[str]] = {}
        self.weights: dict[tuple[int, int], int] = {}  # of a piece of the network's weights, its place in the part's
        self.size = 0
        self.numbers: dict[Size, Any] = {}
        self.shown: dict[int, tuple[fx.Node, int, int]] = {}  # of free sizes: a dimension that is so many times it
        self.calls: list[str] = []

    def run(self) -> Part:
        cuts = self.cuts
        specs = cuts.specs(self.begin) or []
        for place, key in enumerate(self.inputs):
            name = key[0].name if self.begin == 0 else f"input_{place}"
            self.nodes[key] = self.graph.placeholder(name)
        for key, spec in zip(self.inputs, specs, strict=True):
            for d, size in enumerate(spec.sizes):
                if len(size.of) == 1:
                    self.shown.setdefault(size.of[0], (self.nodes[key], d, size.factor))
        mine = cuts._units[self.begin : self.end]
        has_plans = any(unit.record is not None for unit in mine)
        self.source = self.graph.get_attr(WEIGHTS) if has_plans else None  # so the weights are the first buffer
        handed = set(cuts.crossing(self.end))
        for node, units in _by_node(mine):
            if _is_plan(node):
                self.plan(node, units, handed)
            else:
                self.calls.append(str(node.target))
                self.nodes[node, 0] = self.graph.node_copy(node, self.argument)
        if self.end == cuts.count:
            results = tuple(self.argument(x) if isinstance(x, fx.Node) else x for x in cuts._outputs)
        else:
            results = tuple(self.nodes[key] for key in cuts.crossing(self.end))
        self.graph.output(results)
        return self.finish(specs)

    def argument(self, node: fx.Node) -> Any:
        """What stands for a node of the network in this part."""
        if node.op == "get_attr":
            name = str(node.target)
            value = getattr(self.cuts._planned.program, name)
            if isinstance(value, torch.Tensor):
                self.root.register_buffer(name, value)
            else:
                self.root.add_module(name, value)
            if (node, 0) not in self.nodes:
                self.nodes[node, 0] = self.graph.get_attr(name)
            return self.nodes[node, 0]
        if self.cuts._is_size(node):
            return self.number(self.cuts._size_of(node))
        return self.nodes[self.cuts._alias[node]]

    def number(self, size: Size | None) -> Any:
        """A size as a number, or as a node."""
        if size is None:
            raise ValueError("network: a size in it is no product of its free sizes")
        if not size.of:
            return size.factor
        if size not in self.numbers:
            made, *rest = size.of
            product = self.free(made)
            for k in rest:
                product = self.graph.call_function(operator.mul, (product, self.free(k)))
            if size.factor > 1:
                product = self.graph.call_function(operator.mul, (product, size.factor))
            self.numbers[size] = product
        return self.numbers[size]

    def free(self, k: int) -> fx.Node:
        """A free size, from a dimension of what the part takes."""
        if (size := Size(1, (k,))) not in self.numbers:
            if k not in self.shown:
                raise ValueError("the network cannot be cut there")
            source, dim, factor = self.shown[k]
            made = self.graph.call_function(aten.sym_size.int, (source, dim))
            self.numbers[size] = self.graph.call_function(operator.floordiv, (made, factor)) if factor > 1 else made
        return self.numbers[size]

    def plan(self, node: fx.Node, units: Sequence[_Unit], handed: set[Key]) -> None:
        """Some steps of a plan as a plan."""
        cuts, whole = self.cuts, self.cuts._programs[node]
        given, labels = node.args[2], cuts._planned.labels[str(node.args[0].target)]
        made = {unit.makes for unit in units}
        chosen: list[int] = []  # records, with the constants that they read before them
        for unit in units:
            for value in whole.records[unit.record].inputs:
                if cuts._in_plan(node, value) is None and value - len(given) not in chosen:
                    chosen.append(value - len(given))
            chosen.append(unit.record)
        inputs = [key for unit in units for key in unit.reads if key not in made]
        inputs = list(dict.fromkeys(inputs))
        read = {key for unit in cuts._units[self.begin : self.end] if unit.node is not node for key in unit.reads}
        outputs = [unit.makes for unit in units if unit.makes in handed or unit.makes in read]
        numbers = {key: place for place, key in enumerate(inputs)}
        values = {len(given) + record: len(inputs) + place for place, record in enumerate(chosen)}

        def renumbered(value: int) -> int:
            key = cuts._in_plan(node, value)
            return numbers[key] if key in numbers else values[value]

        records = [
            Record(old.kind, [renumbered(value) for value in old.inputs], self.moved(old), list(old.reals))
            for old in (whole.records[place] for place in chosen)
        ]
        specs = [cuts._spec(key) for key in outputs]
        taken = [cuts._values[0][key] for key in inputs]
        flags = [cuts.lies_last(key) for key in outputs]
        program = Program(
            0,
            [(DTYPES[tensor.dtype], tensor.dim()) for tensor in taken],
            records,
            [(values[key[1]], last) for key, last in zip(outputs, flags, strict=True)],
            whole.isa,
            whole.threads,
        )
        name = f"plan_{len(self.plans) + 1}"
        self.plans[name], self.labels[name] = program, [labels[place] for place in chosen]
        sizes = [self.number(size) for spec in specs for size in (spec.sizes if spec is not None else [None])]
        tensors = [cuts._values[0][key] for key in outputs]
        call = self.graph.call_function(
            _PLAN,
            (
                self.graph.get_attr(name),
                self.source,
                [self.nodes[key] for key in inputs],
                sizes,
                [tensor.dim() for tensor in tensors],
                [DTYPES[tensor.dtype] for tensor in tensors],
                [int(last) for last in flags],
            ),
        )
        for place, key in enumerate(outputs):
            self.nodes[key] = self.graph.call_function(operator.getitem, (call, place))

    def moved(self, record: Record) -> list[int]:
        """The numbers of a record, its weights in the part's."""
        piece = weights_of(record)
        if piece is None:
            return list(record.numbers)
        if piece not in self.weights:
            self.weights[piece] = self.size
            self.size += -(-piece[1] // ALIGNMENT) * ALIGNMENT
        return [self.weights[piece], *record.numbers[1:]]

    def finish(self, specs: list[Spec]) -> Part:
        if self.source is not None:
            weights = torch.zeros(self.size, dtype=torch.uint8)
            for (begin, size), place in self.weights.items():
                weights[place : place + size] = self.cuts._planned.weights[begin : begin + size]
            self.root.register_buffer(WEIGHTS, weights)
        for name, program in self.plans.items():
            program.weight_bytes = self.size
            self.root.register_buffer(name, encode(program))
        result = fx.GraphModule(self.root, self.graph)
        result.graph.lint()
        memory, planned = consolidate(result), None
        if self.plans:
            plans = fx.GraphModule(result, result.graph)
            plans._buffers[WEIGHTS] = memory  # which begins with them
            planned = Planned(plans, self.labels, places(result, memory))
        labels = {label for texts in self.labels.values() for label in texts}
        return Part(result, planned, specs, labels, self.calls)


def _values(planned: Planned, inputs: Sequence[torch.Tensor]) -> dict[Key, Any]:
    """What every node, and every step of every plan, yields for these inputs."""
    interpreter = fx.Interpreter(planned.program, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*inputs)
    found: dict[Key, Any] = {(node, 0): value for node, value in interpreter.env.items()}
    for node in planned.program.graph.nodes:
        if _is_plan(node):
            plan, given = _buffer(planned.program, node.args[0]), [interpreter.env[x] for x in node.args[2]]
            program = decode(plan)
            numbers = [len(given) + place for place, record in enumerate(program.records) if record.kind != "constant"]
            program.outputs = [(number, False) for number in numbers]
            results = torch.ops.pykernels.run_plan(encode(program), planned.weights, given, [], [], [], [])
            found.update({(node, number): result for number, result in zip(numbers, results, strict=True)})
    return found


def _by_node(units: Sequence[_Unit]) -> Iterator[tuple[fx.Node, list[_Unit]]]:
    """Units that follow one another, by their node."""
    group: list[_Unit] = []
    for unit in units:
        if group and group[-1].node is not unit.node:
            yield group[-1].node, group
            group = []
        group.append(unit)
    if group:
        yield group[-1].node, group


def _buffer(program: fx.GraphModule, node: Any) -> torch.Tensor:
    return program.get_buffer(str(node.target))


def _is_plan(node: fx.Node) -> bool:
    return node.target is _PLAN

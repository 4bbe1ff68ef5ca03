"""`Optimized`, a network on our kernels; `load` reads what its `save` wrote."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pykernels.cuda import registry
from pykernels.cuda.graphs import CudaGraphs
from pykernels.graph.alias import writes
from pykernels.network.buffers import consolidate, separate
from pykernels.network.devices import follow
from pykernels.network.plan import tune as tuning
from pykernels.network.plan.planned import Planned, PlanReport
from pykernels.network.report import Report, bytes_of
from pykernels.network.saved import file, literals, tree_json
from pykernels.network.saved.graph_json import Unbuilt

__all__ = ["Optimized", "load"]


class Optimized(nn.Module):
    """A network lowered to our kernels. Call it as the model was called; it is for inference only.

    Inputs and outputs have the dtypes, shapes and nesting of the original model's. ``report()`` tells what was done,
    ``save(path)`` writes one file that `load` reads without the model's Python code.

    It runs where its weights are: ``to(device)`` packs them again for another kind of device. On a CUDA device a call
    replays a CUDA graph, captured at the first call with inputs of these shapes, strides and dtypes (the 8 kinds used
    last are kept). Not so while gradients are recorded, inside a capture of the caller's, or in compiled code.

    On the CPU a call runs plans: whole parts of the network in one call each, on all threads of torch's (docs/plan.md).

    Attributes:
        planned: `program` with plans in it, on the CPU; None where no step could be planned.
        in_spec, out_spec: how inputs, positional and keyword ones, and outputs are nested.
        free: of each flat input the dimensions whose sizes may differ from the example's.
        example: of each flat input dtype and shape in the example; None for what is no tensor.
        cuda_graph: whether calls on a CUDA device replay CUDA graphs; may be set.
    """

    planned: Planned | None

    def __init__(
        self,
        program: fx.GraphModule | Unbuilt,
        report: Report,
        in_spec: pytree.TreeSpec,
        out_spec: pytree.TreeSpec,
        free: list[list[int]],
        example: list[tuple[torch.dtype, list[int]] | None],
        planned: Planned | None = None,
    ) -> None:
        super().__init__()
        self._modules["program"] = program
        self._build = _builder(self._modules) if isinstance(program, Unbuilt) else None
        self.planned = planned
        self.free = free
        self.example = example
        self.cuda_graph = True
        self._graphs: CudaGraphs | None = None
        self._report = report
        self.in_spec = in_spec
        self.out_spec = out_spec
        # The ordinary case, tensors in and one tensor out, costs no pytree work a call.
        args, kwargs = pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
        self._flat = not kwargs and list(args) == list(range(in_spec.num_leaves))
        self._single = out_spec.is_leaf()
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer."""
        if not kwargs and self._flat:
            outputs = self._run(*args)
        else:
            names = self.in_spec.child(1).context
            if list(kwargs) != names and set(kwargs) == set(names):
                kwargs = {name: kwargs[name] for name in names}
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if spec != self.in_spec:
                raise ValueError(f"inputs are nested as {spec}, the model was optimized for {self.in_spec}")
            outputs = self._run(*leaves)
        return outputs[0] if self._single else pytree.tree_unflatten(outputs, self.out_spec)

    def nested(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Flat inputs as the positional and the keyword ones of a call."""
        args, kwargs = pytree.tree_unflatten(list(inputs), self.in_spec)
        return args, kwargs

    @property
    def input_names(self) -> list[str]:
        """Of each flat input the name it has in the model's signature."""
        program: Any = self._modules["program"]
        graph: fx.Graph = program.graph  # of a loaded network, too, whose module is not built for this
        return [node.name for node in graph.nodes if node.op == "placeholder"]

    @property
    def output_names(self) -> list[str]:
        """Of each flat output its key, where the model answers with a dictionary of tensors; else ``output_0`` ..."""
        spec = self.out_spec
        if spec.type is dict and all(child.is_leaf() for child in spec.children()):
            return [str(key) for key in spec.context]
        return [f"output_{i}" for i in range(spec.num_leaves)]

    @property
    def program(self) -> fx.GraphModule:
        """The lowered graph, from flat inputs to a flat tuple of outputs, a call of an op for each step."""
        if self._build is not None:  # a loaded network's first use of it
            self._build()
        return self._modules["program"]  # type: ignore[return-value]

    @property
    def dynamic(self) -> bool:
        """Whether any size may differ from the example's."""
        return any(self.free)

    def _run(self, *inputs: Any) -> Any:
        if self._report.device == "cpu":
            if self.planned is None or not self._plannable(inputs):
                return self.program(*inputs)
            return self.planned.program.forward(*inputs)  # not __call__: hooks that nobody sets cost microseconds
        if not self.cuda_graph or torch.compiler.is_compiling():
            return self.program(*inputs)
        if self._graphs is None:
            if any(writes(node) for node in self.program.graph.nodes):  # a capture calls the network several times
                self.cuda_graph = False
                return self.program(*inputs)
            self._graphs = CudaGraphs(self.program)
        return self._graphs(*inputs)

    def _plannable(self, inputs: tuple[Any, ...]) -> bool:
        """Whether this call can take the plans: compilers believe that sizes which are not free are the example's."""
        return not torch.compiler.is_compiling() or all(
            known is None or all(d in free or x.shape[d] == size for d, size in enumerate(known[1]))
            for x, known, free in zip(inputs, self.example, self.free, strict=True)
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Optimized:
        super()._apply(fn, recurse)
        device = follow(self.program)
        self._consolidate(device)
        self._report = self._report.on(device)
        self._report.bytes_after = bytes_of(self.program.buffers())
        self._graphs = None
        return self

    def _consolidate(self, device: torch.device) -> None:
        """Constants on the CPU lie in one piece of memory, which the plans read."""
        if device.type == "cpu":
            weights = consolidate(self.program)
            if self.planned is not None and not self.planned.attach(self.program, weights):
                self.planned = None  # its constants have changed their dtype

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copies keep. They would write a storage again for each buffer that lies in it."""
        modules = {**self._modules, "program": separate(self.program)}
        planned = None if self.planned is None else self.planned.detached()
        return {**self.__dict__, "_modules": modules, "_graphs": None, "_build": None, "planned": planned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._consolidate(torch.device(self._report.device))

    def train(self, mode: bool = True) -> Optimized:
        """Only ``train(False)`` is possible: packed weights cannot be trained."""
        if mode:
            raise RuntimeError("an optimized network is for inference; train the original model and optimize it again")
        return super().train(False)

    def report(self) -> Report:
        """What was fused, what stayed with torch and why, and the size of the weights; printable."""
        return self._report

    def plan(self, inputs: tuple[Any, ...] | None = None, rounds: int = 0) -> PlanReport:
        """What the plans do with `inputs` (by default of the example's shapes): layers, shapes, kernels, bytes,
        operations, memory; printable.

        Args:
            inputs: flat inputs of one call.
            rounds: so many calls are timed, kernel by kernel.

        Raises:
            ValueError: the network has no plans: it is not on the CPU, or no step of it could be planned.
        """
        planned, inputs = self._planned_inputs(inputs)
        return planned.describe(inputs, rounds)

    def _planned_inputs(self, inputs: tuple[Any, ...] | None) -> tuple[Planned, tuple[Any, ...]]:
        if self.planned is None or self._report.device != "cpu":
            raise ValueError("the network has no plans: it is not on the CPU, or no step of it could be planned")
        if inputs is None:
            if None in self.example:
                raise ValueError("inputs: some of the network's are no tensors, so they must be given")
            inputs = tuple(torch.zeros(shape, dtype=dtype) for dtype, shape in filter(None, self.example))
        return self.planned, inputs

    def tune(
        self,
        inputs: tuple[Any, ...] | None = None,
        rounds: int = 20,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Time ways to cut each layer into tiles and tasks, and keep the best ones; `save` writes them down, too.

        They hold for the isa in force and for the number of threads set now (`torch.set_num_threads`); with others the
        network runs as if it had not been tuned. Answers do not change.

        Args:
            inputs: flat inputs of one call, by default of the example's shapes.
            rounds: timed calls for each way.
            progress: called as ``progress("tuning", done, total)``.

        Raises:
            ValueError: as `plan`.
        """
        planned, inputs = self._planned_inputs(inputs)
        tuning.tune(planned, inputs, rounds, progress)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to one file, the same on every machine and from every device.

        What is on a CUDA device is packed again for the CPU in a copy; `load` packs it for the device that it names.

        Raises:
            ValueError: the network calls an operator that a file may not name, or has inputs or outputs of a type
                without a registered name; the message says which.
            OSError: the file cannot be written; what was there is left.
        """
        cpu = torch.device("cpu")
        if self._report.device != "cpu":
            copy.deepcopy(self).to(cpu).save(path)
            return
        try:
            facts = {
                "free": self.free,
                "in_spec": tree_json.dump(self.in_spec),
                "out_spec": tree_json.dump(self.out_spec),
                "report": self._report.to_json(),
                "example": literals.encode(self.example),
            }
            graphs = {"program": self.program}
            if self.planned is not None:
                graphs["planned"], facts["labels"] = self.planned.program, self.planned.labels
            file.write(path, graphs, facts)
        except ValueError as error:
            raise ValueError(f"the network cannot be saved: {error}") from error


def _builder(modules: dict[str, Any]) -> Callable[[], None]:
    """Makes the graph of ops of a loaded network a module. A compiler calls it, it does not trace it."""

    def build() -> None:
        if isinstance(modules["program"], Unbuilt):
            modules["program"] = modules["program"].build()

    # What torch.compiler.assume_constant_result does, which would import all of Dynamo first: a second, 100 MB.
    build._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return build


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Optimized:
    """Read a network that `Optimized.save` wrote, onto `device`. The model's own Python code is not needed.

    Nothing in the file is executed: one from a stranger does no more than compute, when it is called. It is mapped, so
    that processes on one machine share its pages. On the CPU it must not be truncated while the network is in use.

    Raises:
        RuntimeError: our ops do not run on `device`.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, of another version, or not one of ours.
    """
    path, device = os.fspath(path), torch.device(device)
    complaint = registry.unusable(device)
    if complaint is not None:
        raise RuntimeError(f"device: {device} cannot be used: {complaint}")
    try:
        network = _network(*file.read(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"path: {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"path: {path} cannot be loaded: {error}") from error
    return network if device.type == "cpu" else network.to(device)


def _network(graphs: dict[str, Unbuilt], facts: dict[str, Any]) -> Optimized:
    """The network that a file describes.

    Raises:
        ValueError: its parts do not fit.
    """
    missing = [name for name in ("free", "in_spec", "out_spec", "report", "example") if name not in facts]
    if missing or not {"program"} <= set(graphs) <= {"program", "planned"}:
        raise ValueError(f"it has the graphs {sorted(graphs)}, and no {missing}")
    program, report = graphs["program"], Report.from_json(facts["report"])
    in_spec, out_spec = tree_json.parse(facts["in_spec"]), tree_json.parse(facts["out_spec"])
    if in_spec.type is not tuple or [in_spec.child(i).type for i in range(in_spec.num_children)] != [tuple, dict]:
        raise ValueError("its inputs are no positional and keyword ones")
    for graph in graphs.values():
        inputs = sum(node.op == "placeholder" for node in graph.graph.nodes)
        outputs = next(node.args[0] for node in graph.graph.nodes if node.op == "output")
        if inputs != in_spec.num_leaves or not isinstance(outputs, tuple) or len(outputs) != out_spec.num_leaves:
            raise ValueError("its graph has other inputs or outputs than it is said to have")
    free, example = facts["free"], literals.decode(facts["example"])
    if not isinstance(free, list) or len(free) != inputs or not all(map(_dimensions, free)):
        raise ValueError("its free sizes are no dimensions of its inputs")
    if not isinstance(example, list) or len(example) != inputs or not all(map(_tensor_or_none, example)):
        raise ValueError("the shapes of its inputs are no shapes")
    if any(dims and (known is None or max(dims) >= len(known[1])) for known, dims in zip(example, free, strict=True)):
        raise ValueError("its free sizes are no dimensions of its inputs")
    planned = None
    if "planned" in graphs:
        planned = Planned.read(graphs["planned"].build(), facts.get("labels"), program)
    return Optimized(program, report, in_spec, out_spec, free, example, planned)


def _tensor_or_none(content: Any) -> bool:
    if content is None:
        return True
    tensor = isinstance(content, tuple) and len(content) == 2 and isinstance(content[0], torch.dtype)
    return tensor and _dimensions(content[1])


def _dimensions(content: Any) -> bool:
    return isinstance(content, list) and all(type(d) is int and d >= 0 for d in content)

"""From a model to a plain graph: ``torch.export`` with a dynamic batch size, flat inputs and outputs, one run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pykernels.graph.export import NotExportable, export
from pykernels.graph.fold import fold, remove_no_ops
from pykernels.graph.nodes import annotate
from pykernels.graph.spelling import functionalize, normalize, raise_quantizers, share_quantizers

__all__ = [
    "Captured",
    "NotExportable",
    "capture",
    "flat_leaves",
    "plain",
    "prepare",
]


@dataclass
class Captured:
    """A plain graph with what is needed to call it like the model.

    Attributes:
        module: one placeholder for each flat input, one flat tuple of outputs.
        in_spec: how ``(args, kwargs)`` flatten into the inputs.
        out_spec: how the flat outputs make up the answer.
        example: flat example inputs the graph was captured with.
        dynamic: whether the batch size may change.
        notes: remarks for the report.
    """

    module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example: list[Any]
    dynamic: bool
    notes: list[str] = field(default_factory=list)


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool) -> Captured:
    """Export `model` in evaluation. A static graph with a note when only the dynamic batch size is in the way.

    Raises:
        NotExportable: torch.export fails on the model; the message names its reason.
    """
    exported = export(model, args, kwargs, dynamic_batch=dynamic_batch)
    module, in_spec, out_spec = plain(exported.program.module())
    example = pytree.tree_leaves((exported.args, exported.kwargs))
    return Captured(module, in_spec, out_spec, example, exported.dynamic, exported.notes)


def plain(module: fx.GraphModule) -> tuple[fx.GraphModule, pytree.TreeSpec, pytree.TreeSpec]:
    """Strip the pytree wrapping and the guards of an exported module: flat inputs, a flat tuple of outputs.

    Works on what ``ExportedProgram.module()`` and torchao's ``convert_pt2e`` yield. The module is copied, its
    parameters and buffers are shared.
    """
    info = getattr(module.graph._codegen, "pytree_info", None)
    result, out_spec = flat_leaves(module)
    if info is not None:
        return result, info.in_spec, info.out_spec if info.out_spec is not None else out_spec
    count = sum(node.op == "placeholder" for node in result.graph.nodes)
    return result, pytree.tree_structure(((0,) * count, {})), out_spec


def flat_leaves(module: fx.GraphModule) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """The graph with a flat tuple of outputs and no guards, and how the outputs were nested."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    out_spec = pytree.tree_structure(())
    for node in module.graph.nodes:
        if node.op == "call_module":  # the input guards; ours checks its inputs op by op
            if node.users:
                raise NotExportable(f"the exported graph calls a module: {node.target}")
        elif node.op == "call_function" and "_assert" in str(node.target) and not node.users:
            continue
        elif node.op == "output":
            leaves, out_spec = pytree.tree_flatten(node.args[0])
            graph.output(tuple(copies[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    constants = sorted({str(node.target) for node in graph.nodes if node.op == "get_attr"})
    root = nn.Module()
    for name in constants:
        _share(module, root, name)
    result = fx.GraphModule(root, graph)
    for name in constants:  # a graph module copies what it finds under a dotted path, shares are shares
        _share(module, result, name)
    return result, out_spec


def _share(source: nn.Module, root: nn.Module, path: str) -> None:
    """Put the tensor at a dotted path of one module at the same path of another, without a copy."""
    *parents, leaf = path.split(".")
    value: Any = source
    for part in parents:
        value = getattr(value, part)
    value = getattr(value, leaf)
    owner = root
    for part in parents:
        if not isinstance(getattr(owner, part, None), nn.Module):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner.register_buffer(leaf, value)
    else:
        setattr(owner, leaf, value)


def prepare(captured: Captured) -> fx.GraphModule:
    """Canonicalize and fold a captured graph in place, ready to be matched.

    In-place calls on memory that something else can see are functionalized by torch itself, which costs seconds and is
    therefore not done for every model.
    """
    if functionalize(captured.module):
        captured.module = _functionalized_by_torch(captured)
    annotate(captured.module, captured.example)
    remove_no_ops(captured.module)  # a copy in between hides a pattern
    normalize(captured.module)
    fold(captured.module)
    share_quantizers(captured.module)
    raise_quantizers(captured.module)
    captured.module.graph.lint()
    captured.module.recompile()
    return captured.module


def _functionalized_by_torch(captured: Captured) -> fx.GraphModule:
    exported = export(captured.module, tuple(captured.example), dynamic_batch=captured.dynamic)
    captured.dynamic = exported.dynamic
    captured.notes += exported.notes
    module, _, _ = plain(exported.program.run_decompositions({}).module())
    return module

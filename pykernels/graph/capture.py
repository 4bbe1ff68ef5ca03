"""From a model to a plain graph: exported, flat inputs and outputs, functional, one spelling an operation.

`capture` exports; `canonicalize` rewrites what it gave, float graphs and those with quantizers alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pykernels.graph.alias import functionalize, writes
from pykernels.graph.export import NotExportable, export, shapes_like
from pykernels.graph.fold import fold_batch_norms, fold_biases, fold_constants, remove_dropout, remove_no_ops
from pykernels.graph.nodes import erase_dead, infer
from pykernels.graph.qdq import raise_quantizers, share_quantizers
from pykernels.graph.regions import inline_regions
from pykernels.graph.spelling import normalize, shuffle_last
from pykernels.graph.transposed import untranspose
from pykernels.ops.errors import reason

__all__ = ["Captured", "canonicalize", "capture", "flat_leaves", "make_functional", "plain", "with_pytree"]


@dataclass
class Captured:
    """A plain graph with what is needed to call it like the model.

    Attributes:
        module: one placeholder for each flat input, one flat tuple of outputs.
        in_spec: how ``(args, kwargs)`` flatten into the inputs.
        out_spec: how the flat outputs make up the answer.
        example: flat example inputs the graph was captured with.
        dynamic: whether any size may change.
        notes: remarks for the report.
    """

    module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example: list[Any]
    dynamic: bool
    notes: list[str] = field(default_factory=list)


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    training: bool = False,
) -> Captured:
    """Export `model` (see `export.export`) as a functional plain graph. An exported program is taken as it is.

    Buffers that the model writes are copied: they are state of the graph's own from then on.

    Raises:
        NotExportable: torch.export fails on the model; the message names its reason.
    """
    if isinstance(model, torch.export.ExportedProgram):
        program, dynamic, notes = model, bool(model.range_constraints), []
        leaves = pytree.tree_leaves((args, dict(kwargs or {})))
    else:
        exported = export(
            model, args, kwargs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes, training=training
        )
        program, dynamic, notes = exported.program, exported.dynamic, exported.notes
        leaves = pytree.tree_leaves((exported.args, exported.kwargs))
    module, in_spec, out_spec = plain(program.module())
    result = Captured(module, in_spec, out_spec, leaves, dynamic, list(notes))
    if training:  # statistics are written while it trains
        functionalize(result.module)
        result.module.recompile()
    else:
        make_functional(result)
        _own_state(result)
    return result


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


def with_pytree(module: fx.GraphModule, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec) -> fx.GraphModule:
    """Undo `plain` in place: the graph is called like the model again. Returns the module."""
    names = [f"input_{i}" for i in range(in_spec.num_leaves)]
    kwargs = in_spec.child(1).context if in_spec.num_children == 2 else []
    args = [f"arg_{i}" for i in range(in_spec.child(0).num_children)] if in_spec.num_children == 2 else names
    module.graph.set_codegen(
        fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo([*args, *map(str, kwargs)], in_spec, out_spec))
    )
    module.recompile()
    return module


def flat_leaves(module: fx.GraphModule) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """The graph with a flat tuple of outputs and no guards, and how the outputs were nested.

    A constant that is read twice has one node, so that a node's readers are all the readers of what it holds.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    constants: dict[str, fx.Node] = {}
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
        elif node.op == "get_attr" and str(node.target) in constants:
            copies[node] = constants[str(node.target)]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                constants[str(node.target)] = copies[node]
    root = nn.Module()
    for name in sorted(constants):
        _share(module, root, name)
    result = fx.GraphModule(root, graph)
    for name in sorted(constants):  # a graph module copies what it finds under a dotted path, shares are shares
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
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(value.detach(), value.requires_grad)
    elif isinstance(value, torch.Tensor):
        value = value.detach()
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner.register_buffer(leaf, value)
    else:
        setattr(owner, leaf, value)


def make_functional(captured: Captured) -> None:
    """No call of the graph writes, but ``copy_`` into inputs and buffers at its end; regions are part of the graph.

    Writes into memory that something else can see are made functional by torch itself, which costs seconds and is
    therefore not done for every model; so are regions under autocast, whose casts are then spelled out.
    """
    remove_dropout(captured.module)
    if functionalize(captured.module) or not inline_regions(captured.module):
        infer(captured.module, captured.example)
        shapes = shapes_like(captured.module)
        exported = export(captured.module, tuple(captured.example), dynamic_batch=False, dynamic_shapes=shapes)
        try:
            functional = exported.program.run_decompositions({})
        except Exception as error:  # whatever torch's functionalization says of the model's calls
            raise NotExportable(f"torch cannot make the graph functional: {reason(error)}") from error
        captured.module, _, _ = plain(functional.module())
        inline_regions(captured.module)
    captured.module.graph.lint()
    captured.module.recompile()


def _own_state(captured: Captured) -> None:
    """Copy what the graph writes into, so that the model keeps its own."""
    module = captured.module
    state = {str(value.target) for node in module.graph.nodes for value in writes(node) if value.op == "get_attr"}
    for name in sorted(state):
        *parents, leaf = name.split(".")
        owner = module.get_submodule(".".join(parents))
        setattr(owner, leaf, getattr(owner, leaf).clone())
    if state:
        captured.notes.append(f"it keeps state of its own, which each call changes: {', '.join(sorted(state))}")


def canonicalize(
    module: fx.GraphModule, example: Sequence[Any] = (), *, training: bool = False, channels_last: bool = True
) -> fx.GraphModule:
    """Bring a functional plain graph to one spelling and fold what is constant, in place; returns it.

    Args:
        example: stands for the inputs where the graph holds no fake values of them.
        training: leave dropout and batch norms as they are.
        channels_last: write moves for activations that lie so. Not before a calibration: torch would then sum in
            another order than the model does.
    """
    infer(module, example)
    remove_no_ops(module, training)  # a copy in between hides a pattern
    normalize(module, training)
    infer(module)
    if not training:
        fold_constants(module)
        fold_biases(module)
        fold_batch_norms(module)
        infer(module)
        untranspose(module)
    share_quantizers(module)
    raise_quantizers(module)
    if channels_last:
        shuffle_last(module)
    erase_dead(module)
    infer(module)
    module.graph.lint()
    module.recompile()
    return module

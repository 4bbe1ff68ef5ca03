"""Networks pruned to a latency: what was predicted, what is measured, and torch-pruning's at as many operations.

For each budget a network of torchvision's is pruned by `pk.prune`, with random weights: which channels go means
nothing, what the network takes does. The rival is torch-pruning's magnitude pruner with one ratio for all layers,
searched so that as many operations are left. All run in one process, on our kernels.
"Steps" is the sum of a call's steps, each the quickest of many rounds; "call" the quickest of whole calls in turn,
which others at work on the machine disturb.

    python -m benchmarks.prune [--network resnet50] [--precision int8] [--budgets 0.6 0.5] [--threads 1] [--size 224]
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
from torch import nn

import pykernels as pk
from pykernels.bench import zoo
from pykernels.bench.timing import interleave
from pykernels.prune.latency import compare, lower


def uniform(model: nn.Module, x: torch.Tensor, operations: float) -> tuple[nn.Module, float]:
    """torch-pruning's network that is nearest to so many operations, and how many it has."""
    import torch_pruning

    heads = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    low, high, best = 0.0, 0.95, (copy.deepcopy(model), zoo.count(model, x)[0])
    for _ in range(12):
        ratio, pruned = (low + high) / 2, copy.deepcopy(model)
        names = {id(m): n for n, m in model.named_modules()}
        ignored = [pruned.get_submodule(names[id(m)]) for m in heads]
        pruner = torch_pruning.pruner.MagnitudePruner(
            pruned, x, importance=torch_pruning.importance.MagnitudeImportance(), pruning_ratio=ratio,
            ignored_layers=ignored,
        )  # fmt: skip
        pruner.step()
        found = zoo.count(pruned.eval(), x)[0]
        if abs(found - operations) < abs(best[1] - operations):
            best = pruned, found
        low, high = (ratio, high) if found > operations else (low, ratio)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="torchvision's name")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.6, 0.5])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    model, x = zoo.network(options.network, size=options.size), torch.randn(1, 3, options.size, options.size)
    whole = zoo.count(model, x)[0]
    original = lower(model, (x,), options.precision)
    print(f"{options.network}, {options.precision}, {options.threads} threads, {torch.ops.pykernels._isa()}")
    print("| budget | operations | predicted | steps | steps, ms | call | rival: operations | steps | call | gain |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for budget in options.budgets:
        found = pk.prune(model, (x,), latency=budget, precision=options.precision, importance="magnitude")
        operations = found.report().operations[1]
        rival, theirs = uniform(model, x, operations)
        networks = [original, *(lower(m, (x,), options.precision) for m in (found.model, rival))]
        before, ours, other = compare(*networks)
        calls = [timing.best for timing in interleave([n.call for n in networks], rounds=30, seconds=60.0)]
        print(
            f"| {budget} | {operations / whole:.3f} | {found.report().predicted:.3f} | {ours / before:.3f} "
            f"| {1e3 * before:.2f} -> {1e3 * ours:.2f} | {calls[1] / calls[0]:.3f} | {theirs / whole:.3f} "
            f"| {other / before:.3f} | {calls[2] / calls[0]:.3f} | {100 * (other / ours - 1):.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()

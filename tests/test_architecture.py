"""The rooms of the house: imports point one way, and no file imports what imports it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent / "pykernels"
# A room may import, at the top of a file, rooms that stand before it.
ORDER = (
    "ops",
    "cuda",
    "graph",
    "from_onnx",
    "network",
    "reference",
    "quantization",
    "precision",
    "nn",
    "optimized",
    "optimize",
    "tune",
    "comm",
    "parallel",
    "bench",
    "prune",
    "distil",
    "compress",
    "serve",
    "cli",
)


def modules() -> dict[str, ast.Module]:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text()) for path, name in names.items()}


def _for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(tree: ast.Module, name: str, known: set[str]) -> Iterator[str]:
    """What a file imports when it is imported itself, by names below `pykernels`."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("pykernels.") for a in node.names if a.name.startswith("pykernels."))
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").removeprefix("pykernels").removeprefix(".")
            if node.level:
                base = ".".join(filter(None, [*name.split(".")[: -node.level], node.module]))
            elif not (node.module or "").startswith("pykernels"):
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in known else base
        for field in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not _for_types(node):
                pending += getattr(node, field, [])


def test_imports_point_one_way() -> None:
    found = modules()
    wrong = []
    for name, tree in found.items():
        room = name.split(".")[0]
        if room not in ORDER:  # the package itself, and __main__
            continue
        for other in imported(tree, name, set(found)):
            there = other.split(".")[0]
            if there in ORDER and ORDER.index(there) > ORDER.index(room):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_file_imports_what_imports_it() -> None:
    found = modules()
    edges = {name: {o for o in imported(tree, name, set(found)) if o in found} for name, tree in found.items()}
    # A package imports its files, and each of these is part of it.
    edges = {a: {b for b in others if not a.startswith(f"{b}.") and b != a} for a, others in edges.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_importing_the_package_imports_nothing_that_it_may_not_need() -> None:
    """Triton and extras may not be there; torchao, the benchmarks and symbolic sizes take seconds."""
    heavy = (
        "highspy", "matplotlib", "onnx", "pykernels.bench", "pykernels.cuda.triton", "pykernels.quantization",
        "sympy", "torch_pruning", "torchao", "triton",
    )  # fmt: skip
    code = f"import sys, pykernels; print([m for m in sys.modules if m.startswith({heavy})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_root_of_the_package_holds_what_a_user_imports() -> None:
    wanted = {"__init__.py", "__main__.py", "distil.py", "optimize.py", "optimized.py"}
    assert {path.name for path in ROOT.glob("*.py")} == wanted

"""Is every op right on this GPU? What cannot be known where there is none.

    make gpu-check          (python -m benchmarks.gpu.check [--only ops gemm conv codecs networks sanitizer])

ops        every sample of tests/contract.py: the CPU's answer (integers to the bit), opcheck, torch.compile,
           torch.export, a CUDA graph, no hidden synchronisation, the second GPU where there is one
gemm       every configuration of the CUDA library's int8 GEMM against exact sums and the oracle's epilogue
conv       likewise of its int8 convolution
codecs     the gradient codecs' bytes against the oracle's
networks   whole networks optimized, swapped, moved, saved, replayed as CUDA graphs: the CPU's answers
sanitizer  the samples once more under compute-sanitizer, where it is installed

Writes docs/benchmarks/gpu/check.json and leaves with status 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import check_codecs, check_library
from benchmarks.gpu.timing import facts, require_gpu, save
from pykernels.ops import packed as packing

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from contract import CPU_ONLY, Sample, samples  # noqa: E402

PARTS = ("ops", "gemm", "conv", "codecs", "networks", "sanitizer")
# Sums of floats in another order than the CPU's; everything else has the CPU's bits.
SUMS = {"linear", "conv2d", "conv_bn_act", "avg_pool2d", "adaptive_avg_pool2d", "softmax", "layer_norm", "attention"}
SUMS |= {"upsample_bilinear2d"}  # ATen's
SANITIZER_SECONDS = 150


def on(device: str, name: str, value: Any) -> Any:
    """An argument of a sample on a device: packed weights are packed for it, segments stay in the host's memory."""
    if not isinstance(value, torch.Tensor) or name == "segments":
        return value
    return packing.repack(value, device) if name == "packed" else value.to(device)


def same(op: str, actual: Any, expected: Any) -> str | None:
    """What is wrong with results on a device, or None."""
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if op.endswith("_pack"):
            a = packing.repack(a, "cpu")
        if a.shape != e.shape or a.dtype != e.dtype:
            return f"{list(a.shape)} {a.dtype}, not {list(e.shape)} {e.dtype}"
        if not op.endswith("_pack") and a.stride() != e.stride():
            return f"strides {a.stride()}, not {e.stride()}"
        a = a.cpu()
        if op in SUMS:
            tolerance = 1e-4 if e.dtype == torch.float32 else 2e-2
            good = torch.allclose(a.float(), e.float(), rtol=tolerance, atol=tolerance)
        else:
            good = torch.equal(a.nan_to_num(), e.nan_to_num())
        if not good:
            return f"{(a != e).sum()} of {e.numel()} elements differ, by {(a.double() - e.double()).abs().max():.3g}"
    return None


def aspects(
    sample: Sample, tensors: dict[str, torch.Tensor], expected: Any, first: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is looked at, by name: calls that return what is wrong, or None, or raise."""
    op = getattr(torch.ops.pykernels, sample.op)
    call = lambda: sample.call(**tensors)  # noqa: E731
    yield "result", lambda: same(sample.op, call(), expected)

    def check_operator() -> None:
        gathered = {"xs": [tensors["a"], tensors["b"]]} if sample.op == "qcat" else dict(tensors)
        torch.library.opcheck(op.default, (), {**gathered, **sample.rest},
                              test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))  # fmt: skip

    yield "opcheck", check_operator
    if not sample.op.endswith("_pack"):  # they look at scales: they wait for the device, once a layer
        yield "no synchronisation", lambda: unsynchronised(call)
        if not sample.mutated:
            yield "CUDA graph", lambda: same(sample.op, captured(call), expected)
    if first:  # one sample an op: each costs seconds
        names = list(tensors)
        run = lambda *given: sample.call(**dict(zip(names, given, strict=True)))  # noqa: E731
        yield "torch.compile", lambda: same(sample.op, compiled(run, tuple(tensors.values())), expected)
        yield "torch.export", lambda: exported(run, tuple(tensors.values()), sample.op, expected)


def unsynchronised(call: Callable[[], Any]) -> None:
    """Run it while torch raises at every wait that it knows of."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(call: Callable[[], Any]) -> Any:
    """What a replayed graph of the call leaves."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for leaf in tree_leaves(out):
        leaf.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return out


def compiled(run: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    torch.compiler.reset()  # to it every op's `run` is the same function, compiled again and again
    return torch.compile(run, fullgraph=True, dynamic=False)(*given)


def exported(run: Callable[..., Any], given: tuple[Any, ...], op: str, expected: Any) -> str | None:
    class Model(torch.nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return run(*arguments)

    return same(op, torch.export.export(Model(), given, strict=False).module()(*given), expected)


def check_ops(light: bool = False) -> dict[str, Any]:
    """Every sample. `light`: only its result, which is enough for the sanitizer."""
    torch.manual_seed(0)
    wrong: dict[str, str] = {}
    looked_at, seen = 0, set()
    for sample in samples():
        if sample.op in CPU_ONLY:
            continue
        host = sample.make(3)
        expected = sample.call(**host)
        for device in range(1 if light else min(2, torch.cuda.device_count())):
            tensors = {name: on(f"cuda:{device}", name, value) for name, value in host.items()}
            whole = device == 0 and not light
            for aspect, look in aspects(sample, tensors, expected, whole and sample.op not in seen):
                if aspect != "result" and not whole:
                    continue
                name = f"{sample.name}, {aspect}" + (", second GPU" if device else "")
                looked_at += 1
                try:
                    complaint = look()
                except Exception as error:  # told below; the others are looked at
                    complaint = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                if complaint is not None:
                    wrong[name] = complaint
        seen.add(sample.op)
    return {"looked_at": looked_at, "wrong": wrong}


def check_gradient_codecs() -> dict[str, Any]:
    names = [*check_codecs.CODECS, "sparse"]
    good = [*(check_codecs.check_dense(codec) for codec in check_codecs.CODECS), check_codecs.check_sparse()]
    return {"looked_at": len(names), "wrong": {n: "bytes differ" for n, g in zip(names, good, strict=True) if not g}}


def check_whole_networks() -> dict[str, Any]:
    from benchmarks.gpu.check_networks import check_networks  # imports torchao, which the sanitizer need not watch

    found = check_networks(torch.device("cuda"))
    return {"looked_at": len(found), "wrong": {name: wrong for name, wrong in found.items() if wrong is not None}}


def check_sanitizer() -> dict[str, Any]:
    beside = pathlib.Path("/usr/local").glob("cuda*/bin/compute-sanitizer")
    tool = shutil.which("compute-sanitizer") or next(map(str, beside), None)
    if tool is None:
        return {"looked_at": 0, "wrong": {}, "skipped": "compute-sanitizer is not installed"}
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.check", "--light"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        return {"looked_at": 0, "wrong": {}, "skipped": f"not done within {SANITIZER_SECONDS} s"}
    found = "\n".join(line for line in done.stdout.splitlines() if line.startswith("========="))[-2000:]
    wrong = {} if done.returncode == 0 else {"compute-sanitizer": found or done.stderr[-2000:]}
    return {"looked_at": 1, "wrong": wrong}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--light", action="store_true", help="results of the ops alone, and no report")
    given = arguments.parse_args()
    require_gpu("check")
    torch.backends.cudnn.allow_tf32 = False
    console = Console(width=160)
    if given.light:
        wrong = check_ops(light=True)["wrong"]
        console.print(wrong or "as on the CPU")
        sys.exit(bool(wrong))
    made = {
        "ops": check_ops,
        "gemm": check_library.check_gemm,
        "conv": check_library.check_conv,
        "codecs": check_gradient_codecs,
        "networks": check_whole_networks,
        "sanitizer": check_sanitizer,
    }
    report: dict[str, Any] = {"facts": facts()}
    for part in given.only:
        begin = time.perf_counter()
        report[part] = {**made[part](), "seconds": round(time.perf_counter() - begin, 1)}
        found = report[part]
        counts = f"{found['looked_at']} looked at, {len(found['wrong'])} wrong, {found['seconds']} s"
        console.print(f"[bold]{part}[/]: {counts} {found.get('skipped', '')}")
        for name, complaint in found["wrong"].items():
            console.print(f"  [red]{name}[/]: {complaint}", highlight=False)
    console.print(f"written: {save('check', report)}")
    sys.exit(any(report[part]["wrong"] for part in given.only))


if __name__ == "__main__":
    main()

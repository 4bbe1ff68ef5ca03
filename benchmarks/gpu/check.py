"""Is every op right on this GPU? What cannot be known where there is none.

    make gpu-check
    python -m benchmarks.gpu.check [--only ops gemm conv codecs networks distributed
                                   sanitizer] [--processes 16]

ops        every sample of tests/contract.py: the CPU's answer (integers to the bit), opcheck, torch.compile,
           torch.export, a CUDA graph, no hidden synchronisation, the second GPU where there is one
gemm       every configuration of the CUDA library's int8 GEMM against exact sums and the oracle's epilogue
conv       likewise of its int8 convolution
codecs     the gradient codecs' bytes against the oracle's
networks   whole networks optimized, swapped, moved, saved, replayed as CUDA graphs: the CPU's answers
distributed  gradients between ranks: FSDP's hooks over NCCL with one rank, DDP's over gloo with two on one GPU, and
           both over NCCL where there are two GPUs
sanitizer  the samples once more under compute-sanitizer, where it is installed

The parts run side by side, in shares, a process each: what takes their time is compiling, and oracles on the CPU. What
is wrong is printed as it is found. Writes docs/benchmarks/gpu/check.json; leaves with status 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import check_codecs, check_library
from benchmarks.gpu.side_by_side import Findings, Share, Skipped, run, share_of
from benchmarks.gpu.timing import facts, require_gpu, save
from benchmarks.gpu.warm import cores
from pykernels.ops import packed as packing

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from contract import CPU_ONLY, Sample, samples  # noqa: E402

# Sums of floats in another order than the CPU's; everything else has the CPU's bits.
SUMS = {"linear", "conv2d", "conv_bn_act", "avg_pool2d", "adaptive_avg_pool2d", "softmax", "layer_norm", "attention"}
SUMS |= {"upsample_bilinear2d"}  # ATen's
SANITIZER_SECONDS = 130
DISTRIBUTED_SECONDS = 130


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


def check_ops(number: int = 0, of: int = 1, light: bool = False) -> Findings:
    """Every sample. `light`: only its result, which is enough for the sanitizer."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    known = [sample for sample in samples() if sample.op not in CPU_ONLY]
    firsts = {sample.op: sample.name for sample in reversed(known)}
    for sample in share_of(known, number, of):
        host = sample.make(3)
        expected = sample.call(**host)
        for device in range(1 if light else min(2, torch.cuda.device_count())):
            tensors = {name: on(f"cuda:{device}", name, value) for name, value in host.items()}
            whole = device == 0 and not light
            for aspect, look in aspects(sample, tensors, expected, whole and firsts[sample.op] == sample.name):
                if aspect != "result" and not whole:
                    continue
                try:
                    complaint = look()
                except Exception as error:  # told below; the others are looked at
                    complaint = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                yield f"{sample.name}, {aspect}" + (", second GPU" if device else ""), complaint


def check_gradient_codecs(number: int = 0, of: int = 1) -> Findings:
    for codec in share_of([*check_codecs.CODECS, "sparse"], number, of):
        torch.manual_seed(0)
        good = check_codecs.check_sparse() if codec == "sparse" else check_codecs.check_dense(codec)
        yield codec, None if good else "bytes differ"


def check_whole_networks(number: int = 0, of: int = 1) -> Findings:
    from benchmarks.gpu.check_networks import check_networks  # imports torchao, which the sanitizer need not watch

    torch.backends.cudnn.allow_tf32 = False
    yield from check_networks(torch.device("cuda"), number=number, of=of)


def check_sanitizer(number: int = 0, of: int = 1) -> Findings:
    beside = pathlib.Path("/usr/local").glob("cuda*/bin/compute-sanitizer")
    tool = shutil.which("compute-sanitizer") or next(map(str, beside), None)
    if tool is None:
        raise Skipped("compute-sanitizer is not installed")
    light = [sys.executable, "-m", "benchmarks.gpu.check", "--light", str(number), str(of)]
    command = [tool, "--error-exitcode", "9", *light]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        raise Skipped(f"share {number + 1} of {of} was not done within {SANITIZER_SECONDS} s") from None
    found = "\n".join(line for line in done.stdout.splitlines() if line.startswith("========="))[-2000:]
    wrong = None if done.returncode == 0 else found or done.stderr[-2000:]
    yield f"compute-sanitizer, share {number + 1} of {of}", wrong


def check_ranks(number: int = 0, of: int = 1) -> Findings:
    """In processes of its own, which have processes in turn, as a share may not."""
    command = [sys.executable, "-m", "benchmarks.gpu.check_distributed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DISTRIBUTED_SECONDS)
    for line in done.stdout.splitlines():
        if line.startswith("["):
            name, wrong = json.loads(line)
            yield name, wrong
    if done.returncode != 0:
        yield "ranks", done.stderr[-2000:] or f"ended with status {done.returncode}"
    if torch.cuda.device_count() < 2:
        raise Skipped("nothing between two GPUs, since there is one")


# The part, what looks at it, and its shares: those that take longest first.
PARTS: dict[str, tuple[Callable[[int, int], Findings], int]] = {
    "sanitizer": (check_sanitizer, 4),
    "ops": (check_ops, 4),
    "networks": (check_whole_networks, 3),
    "codecs": (check_gradient_codecs, 3),
    "distributed": (check_ranks, 1),
    "gemm": (check_library.check_gemm, 1),
    "conv": (check_library.check_conv, 1),
    "few_channels": (check_library.check_few_channels, 1),
}


def check_parts(parts: Iterable[str], at_once: int, threads: int, console: Console) -> dict[str, dict[str, Any]]:
    """The report on the parts: `looked_at`, `wrong` by name, seconds of the longest share. It is printed as well."""
    shares = [Share(part, look, i, of) for part, (look, of) in PARTS.items() if part in parts for i in range(of)]
    left = Counter(share.part for share in shares)
    report: dict[str, dict[str, Any]] = {part: {"looked_at": 0, "wrong": {}, "seconds": 0.0} for part in left}
    for news in run(shares, at_once, threads):
        part, found = news.share.part, report[news.share.part]
        if news.skipped is not None:
            found["skipped"] = news.skipped
        elif news.seconds is None:
            name, wrong = (str(news.share), news.error) if news.error is not None else news.value
            found["looked_at"] += 1
            if wrong is not None:
                found["wrong"][name] = wrong
                console.print(f"{part}: [red]{escape(name)}[/]: {escape(wrong)}", highlight=False)
        else:
            found["seconds"] = max(found["seconds"], round(news.seconds, 1))
            left[part] -= 1
            if left[part] == 0:
                counts = f"{found['looked_at']} looked at, {len(found['wrong'])} wrong, {found['seconds']} s"
                console.print(f"[bold]{part}[/]: {counts} {found.get('skipped', '')}")
    return report


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments.add_argument("--processes", type=int, default=cores(), help="how many work at a time: as many as cores")
    arguments.add_argument("--light", type=int, nargs=2, metavar=("SHARE", "OF"),
                           help="results of a share of the ops alone, and no report")  # fmt: skip
    given = arguments.parse_args()
    require_gpu("check")
    console = Console(width=160)
    if given.light:
        wrong = {name: complaint for name, complaint in check_ops(*given.light, light=True) if complaint is not None}
        console.print(wrong or "as on the CPU")
        sys.exit(bool(wrong))
    # torch.compile's own processes and torch's threads would be as many as cores in each of ours
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    begin = time.perf_counter()
    found = check_parts(given.only, given.processes, max(1, cores() // given.processes), console)
    report = {"facts": facts(), "date": time.strftime("%Y-%m-%d"), **found}
    console.print(f"{time.perf_counter() - begin:.0f} s; written: {save('check', report)}")
    sys.exit(any(part["wrong"] for part in found.values()))


if __name__ == "__main__":
    main()

"""One machine's figures as a page: every network beside the fastest rival, layers under the roofline, batches, threads.

    python -m benchmarks.report                       # docs/benchmarks/<machine>.md, .json and .svg: hours
    python -m benchmarks.report -n resnet18 --scaled resnet18 --rounds 5 -o out

Measured as `pykernels bench` measures (docs/benchmarks.md). Every figure of the page is in the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from pykernels.bench import Result, Run, cases, chart, families, report
from pykernels.bench.harness import run_cases

SCALED = ("resnet50", "mobilenet_v2")
LAYERS = ("resnet50", "mobilenet_v2")
BATCHES = (1, 2, 4, 8, 16)
PARTS = ("networks", "layers", "batches", "threads")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--networks", nargs="*", help="only these, by name (none named: the default set)")
    parser.add_argument(
        "--scaled", nargs="*", default=SCALED, help="networks that are run at other batches and threads"
    )
    parser.add_argument("--layers", nargs="*", default=LAYERS, help="shape files of convolutions for the roofline")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--threads", nargs="*", type=int, default=thread_counts(len(os.sched_getaffinity(0))))
    parser.add_argument("-p", "--precisions", nargs="*", default=("fp32", "bf16", "int8"))
    parser.add_argument("-r", "--rivals", nargs="*", default=(), help="only those whose name contains one of these")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0, help="about so much timing a case")
    parser.add_argument("-o", "--output", type=pathlib.Path, default=pathlib.Path("docs/benchmarks"))
    return parser.parse_args(argv)


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4 … and all cores."""
    return sorted({2**i for i in range(cores.bit_length()) if 2**i < cores} | {cores})


def measure(asked: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs of each part; the part of threads has one for each number of threads."""

    def run(wanted: Sequence[tuple[str, str, families.Make]], rivals: Sequence[str], threads: int | None = None) -> Run:
        return run_cases(
            wanted, asked.precisions, rivals, asked.rounds, asked.seconds, threads,
            tell=lambda message: print(f"  {message}", file=sys.stderr, flush=True),
        )  # fmt: skip

    listed = [(s["name"], s["batch"]) for s in families.load_shapes()["networks"]["layers"]]
    if asked.networks:
        listed = [pair for name in asked.networks for pair in [p for p in listed if p[0] == name] or [(name, 1)]]

    def networks(pairs: Sequence[tuple[str, int]]) -> list[tuple[str, str, families.Make]]:
        return [("network", f"{n} b{b}", lambda n=n, b=b: families.network_case(n, b, asked.size)) for n, b in pairs]

    found = {part: [] for part in PARTS}
    found["networks"] = [run(networks(listed), asked.rivals)]
    layers = [("conv", label, make) for label, make in cases("conv", tuple(asked.layers))] if asked.layers else []
    if layers:
        found["layers"] = [run(layers, ("no rival",))]
    if asked.scaled and asked.batches:
        found["batches"] = [run(networks([(n, b) for n in asked.scaled for b in asked.batches]), asked.rivals)]
    if asked.scaled:
        found["threads"] = [run(networks([(n, 1) for n in asked.scaled]), asked.rivals, t) for t in asked.threads]
    return found


def stem(run: Run) -> str:
    """The machine in a file's name: processor, isa and threads."""
    facts = f"{run.machine.get('cpu')} {run.machine.get('isa')} {run.settings['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", facts.lower()).strip("-")


def beside(ours: Result, rival: Result) -> list[str]:
    """Cells of one comparison: ours, who is fastest, its time, rival ÷ ours, the limit, and what we reached of it."""

    def taken(result: Result) -> str:
        return report.milliseconds(result.taken) + (" ~" if (result.spread or 0) > 0.2 else "")

    limit = ["", ""]
    if ours.share is not None:
        limit = [report.milliseconds(ours.share * ours.taken), f"{100 * ours.share:.0f} %"]
    return [taken(ours), rival.rival, taken(rival), report.times(rival.taken / ours.taken), *limit]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def page(found: dict[str, list[Run]], name: str, command: str) -> str:
    """The Markdown; charts are named `name`-<part>.svg."""
    (run,) = found["networks"]
    columns = ["ours ms", "fastest rival", "ms", "rival ÷ ours", "limit ms", "of limit"]
    facts = run.machine
    lines = [f"# {facts.get('cpu')}, {run.settings['threads']} threads, {facts.get('isa')}", ""]
    lines += [f"Written by `{command}` on {run.date[:10]}; how it is measured: [benchmarks.md](../benchmarks.md).", ""]
    if run.peaks is not None:
        peaks = ", ".join(f"{k} {v / 1e9:.0f} GOP/s" for k, v in run.peaks.operations.items())
        levels = ", ".join(f"{level.name} {level.read / 1e9:.0f} GB/s" for level in run.peaks.levels)
        lines += [f"Measured peaks: {peaks}; read from {levels}.", ""]
    lines += [f"Versions: {', '.join(f'{k} {v}' for k, v in run.versions.items())}.", ""]
    lines += ["## Networks", ""]
    lines += [
        "`~`: the rounds differed by more than 20 %. The limit is `max(operations / peak, bytes / bandwidth)`.",
        "",
    ]
    rows = [[title, precision, *beside(*both)] for title, precision, *both in report.pairs(run.results)]
    lines += table(["network", "", *columns], rows)
    lines += [f"![rival ÷ ours](./{name}-networks.svg)", ""] if rows else []
    missing = {r.label: f"- {r.label}, {r.title}: {r.reason}" for r in run.results if r.median_ms is None}
    lines += ["Without a time (of each rival the last case):", "", *missing.values(), ""] if missing else []
    if found["layers"]:
        lines += ["## Layers under the roofline", "", f"![roofline](./{name}-layers.svg)", ""]
    for part, heading in (("batches", "Batches"), ("threads", "Threads")):
        rows = [
            [title, precision, *([str(one.settings["threads"])] if part == "threads" else []), *beside(*both)]
            for one in found[part]
            for title, precision, *both in report.pairs(one.results)
        ]
        if rows:
            lines += [
                f"## {heading}",
                "",
                *table(["network", "", *(["threads"] if part == "threads" else []), *columns], rows),
            ]
            lines += [f"![images a second](./{name}-{part}.svg)", ""]
    return "\n".join(lines)


def draw(found: dict[str, list[Run]], folder: pathlib.Path, name: str) -> None:
    """The charts of those parts that have something to show."""
    (run,) = found["networks"]
    if report.pairs(run.results):
        chart.draw_ratios(run, folder / f"{name}-networks.svg")
    for layers in found["layers"]:
        chart.draw_roofline(layers, folder / f"{name}-layers.svg")
    for part in ("batches", "threads"):
        series: chart.Series = {}
        for one in found[part]:
            for _, precision, *both in report.pairs(one.results):
                network, _, batch = both[0].case.rpartition(" b")
                place = int(batch) if part == "batches" else int(one.settings["threads"])
                for who, result in zip(("ours", "fastest rival"), both, strict=True):
                    line = series.setdefault(network, {}).setdefault((who, precision), [])
                    line.append((place, int(batch) / result.taken * 1e3))
        if series:
            chart.draw_scaling(series, part, folder / f"{name}-{part}.svg")


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Measure, write, print the comparison; returns the page's path."""
    asked = arguments(argv)
    found = measure(asked)
    (run,) = found["networks"]
    name, folder = stem(run), asked.output
    folder.mkdir(parents=True, exist_ok=True)
    parts = {part: [dataclasses.asdict(one) for one in runs] for part, runs in found.items()}
    report.write({"format": report.FORMAT, "parts": parts}, folder / f"{name}.json")
    draw(found, folder, name)
    path = folder / f"{name}.md"
    command = shlex.join(["python", "-m", "benchmarks.report", *(sys.argv[1:] if argv is None else argv)])
    path.write_text(page(found, name, command))
    if report.pairs(run.results):
        Console().print(report.summary(run))
    print(f"written: {path}")
    return path


if __name__ == "__main__":
    main()

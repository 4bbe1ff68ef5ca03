"""The command `pykernels comm`: what a link makes of a training step, before anybody rents the machines."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from pykernels.comm.dense import DENSE
from pykernels.comm.layout import Run
from pykernels.comm.measure import NUMEL, codec_speed, powersgd_speed, randomk_speed, topk_speed
from pykernels.comm.model import (
    ENTRY_BYTES,
    FP32_BYTES,
    Link,
    Speed,
    Times,
    predict,
    predict_powersgd,
    predict_randomk,
    predict_topk,
    predict_two_level,
    selected,
    sent_bytes,
    step_seconds,
    thin_numbers,
)

app = typer.Typer(help="Gradients over slow links.", no_args_is_help=True, add_completion=False)
CODECS = ("fp32", *DENSE, "topk", "randomk", "powersgd")
RATIO, RANK, SIDE = 0.01, 4, 1024  # of top-k and random-k; of PowerSGD, and of the square matrices it is given
FIRST_BUCKET, BUCKET = 1 << 18, 25 << 18  # gradients: DistributedDataParallel's 1 MiB and 25 MiB of fp32
BACKWARD = 2 / 3  # of a step's computation: it reads as much as forward twice
TWO_LEVEL = " 2-level"
WORLDS = tuple(2**i for i in range(1, 11))
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


@app.callback()
def main() -> None:
    """Gradients over slow links."""


def bandwidth(text: str) -> float:
    """Bytes/s of "100mbit", "1gbit", "10Gbit/s", "25GB/s".

    Raises:
        ValueError: not such a rate, or 0.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)(?:(bit(?:/s)?|bps)|(B/s))\s*", text, re.IGNORECASE)
    if match is None or (match[4] and match[4][0] != "B"):
        raise ValueError(f"{text!r} is not a rate: 100mbit, 1gbit, 10gbit and 25GB/s are")
    rate = _number(match[1], text) * _PREFIX[match[2].lower()] / (1 if match[4] else 8)
    if rate <= 0:
        raise ValueError(f"{text!r} must be above 0")
    return rate


def duration(text: str) -> float:
    """Seconds of "50us", "1.5ms", "2s".

    Raises:
        ValueError: not such a time.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*(ns|us|ms|s)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a time: 50us, 1.5ms and 2s are")
    return _number(match[1], text) * _SECONDS[match[2]]


def _number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise ValueError(f"{text!r}: {digits} is not a number") from None


def parsed(option: str, parse: Callable[[str], float], text: str) -> float:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from error


def buckets(parameters: int) -> list[int]:
    """Sizes of the buckets that DistributedDataParallel makes of so many parameters, in the order they are sent in."""
    first = min(FIRST_BUCKET, parameters)
    rest = parameters - first
    return [first, *[BUCKET] * (rest // BUCKET), *[rest % BUCKET] * (rest % BUCKET > 0)]


def block(codec: str) -> int:
    return DENSE[codec].default_block if codec in DENSE else 0


@dataclass(frozen=True)
class Site:
    """The ranks and what joins them: `bandwidth` bytes/s out of each host, `latency` seconds of a message."""

    world: int
    bandwidth: float
    latency: float
    ranks_per_host: int = 1


@dataclass(frozen=True)
class Row:
    """A codec's prediction: bytes that a rank sends a step, seconds of communication alone, seconds of a step."""

    codec: str
    sent: float
    communication: float
    step: float


def rows(parameters: int, site: Site, speeds: Mapping[str, Speed], compute: float = 0.0) -> list[Row]:
    """The prediction for each codec in `speeds`, among all ranks and, where hosts have several, in two levels.

    `compute` are a step's seconds without communication.
    """
    world, local = site.world, site.ranks_per_host
    link = Link.between(world, site.bandwidth, site.latency, local)
    numels = buckets(parameters)
    found = []

    def add(name: str, sent: float, times: Sequence[Times]) -> None:
        step = (1 - BACKWARD) * compute + step_seconds(times, BACKWARD * compute)
        found.append(Row(name, sent, step_seconds(times), step))

    ring = 2 * (world - 1) / world * FP32_BYTES
    for codec, speed in speeds.items():
        if codec == "topk":
            times = [predict_topk(numel, RATIO, world, link, speed) for numel in numels]
            add(codec, sum((world - 1) * ENTRY_BYTES * selected(numel, RATIO) for numel in numels), times)
            continue
        if codec == "randomk":
            times = [predict_randomk(numel, RATIO, world, link, speed) for numel in numels]
            add(codec, sum(ring * selected(numel, RATIO) for numel in numels), times)
            continue
        if codec == "powersgd":
            times = [predict_powersgd(parameters, RANK, SIDE, world, link, speed)]
            add(codec, 2 * ring * thin_numbers(parameters, RANK, SIDE), times)
            continue
        size = block(codec)
        runs = [(Run("", 0, numel, False),) for numel in numels]
        times = [predict(codec, run, size, world, link, speed) for run in runs]
        add(codec, sum(sent_bytes(codec, run, size, world) for run in runs), times)
        if codec != "fp32" and 1 < local < world:
            hosts = world // local
            times = [
                predict_two_level(codec, numel, size, hosts, local, site.bandwidth, site.latency, speed)
                for numel in numels
            ]
            parts = [(Run("", 0, -(-numel // local), False),) for numel in numels]
            add(f"{codec}{TWO_LEVEL}", sum(sent_bytes(codec, part, size, hosts) for part in parts), times)
    return found


def measure(world: int, tell: Callable[[str], None] = lambda codec: None) -> dict[str, Speed]:
    """The speed of every codec here."""
    seconds, speeds = 0.03, {}
    for codec in ("fp32", *DENSE):
        tell(codec)
        feedback = codec in DENSE and DENSE[codec].default_feedback
        speeds[codec] = codec_speed(codec, block(codec), world, feedback, seconds=seconds)
    tell("topk, randomk, powersgd")
    speeds["topk"] = topk_speed(RATIO, world, seconds)
    speeds["randomk"] = randomk_speed(RATIO, seconds)
    speeds["powersgd"] = powersgd_speed(RANK, SIDE, seconds)
    return speeds


@app.command()
def plan(
    params: Annotated[str, typer.Option(help="Parameters of the model: 25e6.")],
    world: Annotated[int, typer.Option(min=2, help="Ranks.")],
    link: Annotated[str, typer.Option(help="What a host can send: 100mbit, 1gbit, 10gbit, 25GB/s.")],
    latency: Annotated[str, typer.Option(help="Of a message, one way: 50us, 1ms.")] = "50us",
    compute_ms: Annotated[float, typer.Option(min=0.0, help="What a step takes without communication.")] = 0.0,
    ranks_per_host: Annotated[int, typer.Option(min=1, help="That share a host and its link.")] = 1,
    chart: Annotated[
        pathlib.Path | None, typer.Option(help="Draw step time over bandwidth, and over ranks, to this PNG.")
    ] = None,
) -> None:
    """Predict communication and step time of every codec on a link, from the codecs' speed on this machine.

    [cyan]pykernels comm plan --params 25e6 --world 64 --link 1gbit --compute-ms 300 --chart plan.png[/]
    """
    wanted = parsed("--params", float, params)
    if not 1 <= wanted <= 1e13:
        raise typer.BadParameter(f"--params: {params} is not a number of parameters")
    parameters = int(wanted)
    rate, delay = parsed("--link", bandwidth, link), parsed("--latency", duration, latency)
    if world % ranks_per_host:
        raise typer.BadParameter(f"--ranks-per-host: {ranks_per_host} does not divide --world {world}")
    if chart is not None and not chart.parent.is_dir():
        raise typer.BadParameter(f"--chart: the folder {chart.parent} does not exist")
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("measuring codecs", total=None)
        speeds = measure(world, lambda codec: bar.update(task, description=f"measuring {codec}"))
    site = Site(world, rate, delay, ranks_per_host)
    found = rows(parameters, site, speeds, 1e-3 * compute_ms)
    console = Console(soft_wrap=True)
    console.print(_table(found, speeds, f"{parameters / 1e6:g} M parameters, {world} ranks, {link}, {latency}"))
    console.print(_assumptions(compute_ms, ranks_per_host), style="dim", highlight=False)
    if chart is not None:
        try:
            draw(chart, parameters, site, speeds, 1e-3 * compute_ms)
        except ModuleNotFoundError as error:
            raise typer.BadParameter(f"--chart: {error}") from error
        console.print(f"written: {chart}", highlight=False)


def _table(found: Sequence[Row], speeds: Mapping[str, Speed], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("codec", no_wrap=True)
    for head in ("MB sent", "comm ms", "step ms", "vs fp32", "encode", "reduce", "decode"):
        table.add_column(head, justify="right")
    plain = next(row.step for row in found if row.codec == "fp32")
    best = min(row.step for row in found)
    for row in found:
        speed = speeds[row.codec.removesuffix(TWO_LEVEL)]
        table.add_row(
            row.codec,
            f"{row.sent / 1e6:.2f}",
            f"{1e3 * row.communication:.1f}",
            f"{1e3 * row.step:.1f}",
            f"{plain / row.step:.2f}x",
            *(f"{4e-9 / phase:.1f}" if phase else "-" for phase in (speed.encode, speed.reduce, speed.decode)),
            style="green" if row.step == best else "",
        )
    return table


def _assumptions(compute_ms: float, ranks_per_host: int) -> str:
    shared = (
        f"The {ranks_per_host} ranks of a host share its link; what stays on the host is free. 2-level: "
        "register(..., ranks_per_host=...)."
        if ranks_per_host > 1
        else "Each rank has a link of its own."
    )
    return "\n".join(
        [
            "MB that a rank sends a step; ms of communication alone, of a step. Encode (with error feedback), reduce, "
            f"decode: GB/s of fp32 gradients, measured here on {NUMEL} of them, {torch.get_num_threads()} threads.",
            f"{shared} A rank sends and receives at the full rate at once; no packet is lost.",
            "fp32: a ring all-reduce, 2(W-1) latencies. Codecs: an all-to-all, 1 latency, and a ring all-gather, W-1.",
            f"topk, randomk: {RATIO:.0%} of each bucket, by an all-gather, an all-reduce; topk's reduce is of what was "
            f"selected. powersgd: rank {RANK}, matrices of {SIDE} x {SIDE}, two all-reduces when backward is over.",
            f"Buckets of 1 MiB, then 25 MiB. Backward takes two thirds of the {compute_ms:g} ms and overlaps with the "
            "wire; every parameter is compressed.",
        ]
    )


def draw(path: pathlib.Path, parameters: int, site: Site, speeds: Mapping[str, Speed], compute: float = 0.0) -> None:
    """Step time over bandwidth at the site's ranks, and over 2 to 1024 ranks at its bandwidth, to a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the chart needs matplotlib: pip install matplotlib ({error})") from error

    def steps(**changed: Any) -> dict[str, float]:
        found = rows(parameters, dataclasses.replace(site, **changed), speeds, compute)
        return {row.codec: 1e3 * row.step for row in found}

    rates = [10 ** (i / 8) / 8 for i in range(8 * 7, 8 * 11 + 6)]  # 10 Mbit/s to 400 Gbit/s
    worlds = [ranks for ranks in WORLDS if ranks % site.ranks_per_host == 0 and ranks > site.ranks_per_host]
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _lines(left, [8 * value for value in rates], [steps(bandwidth=value) for value in rates])
    left.axvline(8 * site.bandwidth, color="black", linewidth=0.8, linestyle=":")
    left.set_xlabel("bit/s out of a host")
    left.set_title(f"{site.world} ranks", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    _lines(right, worlds, [steps(world=ranks) for ranks in worlds])
    right.set_xticks(worlds, [str(ranks) for ranks in worlds], minor=False)
    right.set_xlabel("ranks")
    right.set_title(f"{8e-6 * site.bandwidth:g} Mbit/s", fontsize=10)
    figure.suptitle(
        f"Predicted step: {parameters / 1e6:g} M parameters, {1e3 * compute:g} ms computation, "
        f"{1e6 * site.latency:g} us latency, {site.ranks_per_host} ranks a host",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def _lines(axes: Any, at: Sequence[float], found: Sequence[Mapping[str, float]]) -> None:
    for codec in found[0]:
        plain, style = codec.removesuffix(TWO_LEVEL), "--" if codec.endswith(TWO_LEVEL) else "-"
        if plain not in ("fp32", *DENSE):
            style = ":"
        color, width = f"C{CODECS.index(plain)}", 2.5 if plain == "fp32" else 1.4
        axes.plot(at, [values[codec] for values in found], style, label=codec, color=color, linewidth=width)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel("ms a step (log)")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)

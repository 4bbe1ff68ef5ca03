"""The commands `pykernels comm plan-pipeline` and `plan-tensor`: what a link makes of a network that is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pykernels.comm.command import BACKWARD, Row, app, bandwidth, duration, parsed
from pykernels.comm.functional import LEAST
from pykernels.comm.measure import codec_speed
from pykernels.comm.model import Link, Speed
from pykernels.parallel.model import SCHEDULES, message_bytes, pipeline_seconds, predict_hop, predict_sum
from pykernels.parallel.pipeline import STAGE_CODECS

BLOCK = 256

__all__ = ["app"]


def measure(numel: int, world: int = 2) -> dict[str, Speed]:
    """The speed of each codec here, on as many activations as travel at once; without error feedback."""
    return {codec: codec_speed(codec, BLOCK, world, False, seconds=0.03, numel=numel) for codec in STAGE_CODECS}


def pipeline_rows(
    numel: int,
    stages: int,
    chunks: int,
    schedule: str,
    rate: float,
    latency: float,
    speeds: Mapping[str, Speed],
    compute: float,
) -> list[Row]:
    """A step of a pipeline for each codec; `compute` are the seconds of a stage for all `chunks`, both ways."""
    forward, backward = (share * compute / chunks for share in (1 - BACKWARD, BACKWARD))
    found = []
    for codec, speed in speeds.items():
        hop = predict_hop(codec, numel, BLOCK, rate, latency, speed)
        alone = pipeline_seconds(schedule, stages, chunks, 0.0, 0.0, hop)
        step = pipeline_seconds(schedule, stages, chunks, forward, backward, hop)
        ways = 1 if stages == 2 else 2  # a stage in the middle sends both ways
        found.append(Row(codec, ways * chunks * message_bytes(codec, numel, BLOCK), alone, step))
    return found


def tensor_rows(
    numel: int, sums: int, world: int, rate: float, latency: float, speeds: Mapping[str, Speed], compute: float
) -> list[Row]:
    """`sums` all-reduces of `numel` activations for each codec, beside `compute` seconds of each rank."""
    link = Link.between(world, rate, latency)
    found = []
    for codec, speed in speeds.items():
        times, sent = predict_sum(codec if numel >= LEAST else "fp32", numel, BLOCK, world, link, speed)
        found.append(Row(codec, sums * sent, sums * times.total, compute + sums * times.total))
    return found


def _count(option: str, text: str) -> int:
    value = parsed(option, float, text)
    if not 1 <= value <= 1e12:
        raise typer.BadParameter(f"{option}: {text} is not a number of elements")
    return int(value)


def _tell(found: Sequence[Row], title: str, notes: Sequence[str]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("codec", no_wrap=True)
    for head in ("MB sent", "comm ms", "step ms", "vs fp32"):
        table.add_column(head, justify="right")
    plain, best = next(row.step for row in found if row.codec == "fp32"), min(row.step for row in found)
    for row in found:
        cells = f"{row.sent / 1e6:.2f}", f"{1e3 * row.communication:.1f}", f"{1e3 * row.step:.1f}"
        table.add_row(row.codec, *cells, f"{plain / row.step:.2f}x", style="green" if row.step == best else "")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("\n".join(notes), style="dim", highlight=False)


@app.command()
def plan_pipeline(
    elements: Annotated[str, typer.Option(help="That a stage sends for a chunk: tokens x width, 4e6.")],
    stages: Annotated[int, typer.Option(min=2, help="Of the pipeline, one a rank.")],
    link: Annotated[str, typer.Option(help="What a rank can send: 100mbit, 1gbit, 25GB/s.")],
    chunks: Annotated[int, typer.Option(min=1, help="Microbatches of a step.")] = 8,
    schedule: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEDULES)}.")] = "1f1b",
    latency: Annotated[str, typer.Option(help="Of a message, one way: 50us, 1ms.")] = "50us",
    compute_ms: Annotated[float, typer.Option(min=0.0, help="Of a stage for a step, without communication.")] = 0.0,
) -> None:
    """Predict the step of a pipeline for every codec of its stages, from the codecs' speed on this machine.

    [cyan]pykernels comm plan-pipeline --elements 1e6 --stages 4 --chunks 16 --link 1gbit --compute-ms 300[/]
    """
    numel = _count("--elements", elements)
    rate, delay = parsed("--link", bandwidth, link), parsed("--latency", duration, latency)
    if schedule not in SCHEDULES:
        raise typer.BadParameter(f"--schedule: one of {', '.join(SCHEDULES)}, not {schedule}")
    if schedule == "1f1b" and chunks < stages:
        raise typer.BadParameter(f"--chunks: 1f1b needs at least as many as --stages ({stages}), not {chunks}")
    found = pipeline_rows(numel, stages, chunks, schedule, rate, delay, measure(numel), 1e-3 * compute_ms)
    notes = [
        "MB that a stage in the middle sends a step (of two: either one); ms of communication alone, of a step.",
        "Each rank has a link and one stage; a message leaves when the one before it has, while the stage goes on.",
        f"A third of the {compute_ms:g} ms is forward, two thirds backward; a stage spends time on codecs, too.",
    ]
    _tell(found, f"{numel / 1e6:g} M elements a chunk, {stages} stages, {chunks} chunks, {schedule}, {link}", notes)


@app.command()
def plan_tensor(
    elements: Annotated[str, typer.Option(help="Of a sum: tokens x width, 4e6.")],
    sums: Annotated[int, typer.Option(min=1, help="All-reduces: 2 a layer forward, as many backward.")],
    world: Annotated[int, typer.Option(min=2, help="Ranks.")],
    link: Annotated[str, typer.Option(help="What a rank can send: 1gbit, 25GB/s.")],
    latency: Annotated[str, typer.Option(help="Of a message, one way: 50us, 1ms.")] = "50us",
    compute_ms: Annotated[float, typer.Option(min=0.0, help="Of a rank, without communication.")] = 0.0,
) -> None:
    """Predict tensor-parallel layers for every codec of their sums, from the codecs' speed on this machine.

    [cyan]pykernels comm plan-tensor --elements 1e6 --sums 48 --world 2 --link 1gbit --compute-ms 300[/]
    """
    numel = _count("--elements", elements)
    rate, delay = parsed("--link", bandwidth, link), parsed("--latency", duration, latency)
    found = tensor_rows(numel, sums, world, rate, delay, measure(numel, world), 1e-3 * compute_ms)
    notes = [
        "MB that a rank sends; ms of communication alone, and of all. Layers wait for their sums: nothing overlaps.",
        "Two ranks exchange all they have once; more an all-to-all and a ring all-gather. fp32: a ring all-reduce.",
    ]
    if numel < LEAST:
        notes.append(f"Sums of fewer than {LEAST} elements travel as fp32, whatever the codec.")
    _tell(found, f"{sums} sums of {numel / 1e6:g} M elements, {world} ranks, {link}, {latency}", notes)

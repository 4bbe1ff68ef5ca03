"""The command `pykernels bench`."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pykernels.bench import chart, harness, report
from pykernels.bench.case import PRECISIONS
from pykernels.bench.families import FAMILIES

DEFAULT_FAMILIES = ("network", "gemm")


def bench(
    families: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"What to measure: {', '.join(FAMILIES)}, or all. Without: {' and '.join(DEFAULT_FAMILIES)}."
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", "-g", help="Only these shape files or networks: resnet50, bert_base, gemm …"),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option("--precision", "-p", help="Only these: fp32, bf16, int8.")
    ] = None,
    rival: Annotated[
        list[str] | None, typer.Option("--rival", "-r", help="Only rivals whose name contains this (ours always runs).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds a case.")] = 15,
    seconds: Annotated[float, typer.Option(min=0.0, help="About so much timing a case, at least three rounds.")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="For everybody alike; torch's number without.")] = None,
    output: Annotated[
        pathlib.Path, typer.Option("--output", "-o", help="Folder for the JSON and the chart.")
    ] = pathlib.Path("out"),
) -> None:
    """Measure our kernels beside everything else installed, in one process, round by round.

    A wrong answer is never timed: each rival is first held against the oracle. Whoever does not take part is listed
    with the reason. Writes bench.json and bench.png.

    [cyan]pykernels bench conv -g resnet50 -p int8 --rounds 30[/]
    """
    console = Console()
    chosen = tuple(families or DEFAULT_FAMILIES)
    if chosen == ("all",):
        chosen = FAMILIES
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("starting", total=None)
        try:
            found = harness.run(
                chosen,
                tuple(group or ()),
                tuple(precision or PRECISIONS),
                tuple(rival or ()),
                rounds,
                seconds,
                threads,
                tell=lambda message: progress.update(task, description=escape(message)),
                done=lambda results: console.print(report.case_table(results)),
            )
        except ValueError as error:
            progress.stop()
            raise typer.BadParameter(str(error)) from error
    report.print_run(found, console)
    output.mkdir(parents=True, exist_ok=True)
    report.save(found, output / "bench.json")
    written = [str(output / "bench.json")]
    try:
        written.append(str(chart.draw(found, output / "bench.png")))
    except (ModuleNotFoundError, ValueError) as error:
        console.print(f"no chart: {error}", style="yellow")
    console.print(f"written: {', '.join(written)}", highlight=False)

"""The command `pykernels tune`: how many threads, instances and items a call serve a saved network best here."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import pykernels
from pykernels.cli.errors import fail
from pykernels.cli.network import Network, inputs_like, load


def tune(
    network: Network,
    latency_ms: Annotated[
        float | None,
        typer.Option(help="Most items a second whose p99 latency keeps this bound; without, the shortest call."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="About how long it may take.")] = 30.0,
    devices: Annotated[
        str, typer.Option(help="Which to try: cpu,cuda compares them, with the copies to the GPU and back.")
    ] = "cpu",
    output: Annotated[pathlib.Path | None, typer.Option("--output", "-o", help="Where the setup is saved.")] = None,
) -> None:
    """Find how many threads, instances and items a call serve a saved network best here, and where, by timing it.

    Prints what was tried, the best first. (How layers are cut into tasks is another choice: `pykernels optimize
    --tune`.)

    [cyan]pykernels tune net.pk --latency-ms 20 -o setup.json[/]
    """
    if output is not None and not output.parent.is_dir():
        fail(f"--output: the folder {output.parent} does not exist")
    fast = load(network)
    args, kwargs = fast.nested(inputs_like(fast))
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("timing", total=None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, description=f"timing {stage}", completed=done, total=total)

        try:
            names = devices.split(",")
            setup = pykernels.tune(fast, args, latency_ms, seconds, kwargs=kwargs, progress=show, devices=names)
        except (RuntimeError, ValueError, TypeError) as error:
            progress.stop()
            fail(_option(str(error)))
    print(setup.report())
    if output is not None:
        try:
            setup.save(output)
        except OSError as error:
            fail(f"--output: {error}")
        console.print(f"saved [bold]{output}[/]: pykernels.Setup.load({str(output)!r})")


def _option(message: str) -> str:
    """An error of `pykernels.tune`, by the option's name."""
    for name in ("latency_ms", "seconds", "devices"):
        if message.startswith(f"{name}:"):
            return f"--{name.replace('_', '-')}{message.removeprefix(name)}"
    return message

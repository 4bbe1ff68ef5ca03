"""The command `pykernels`: doctor, optimize, compress, plan, tune, serve, split, part, bench, comm."""

from __future__ import annotations

import enum
import importlib
import pathlib
import sys
from typing import Annotated, Any

import torch
import typer
import typer.core
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import pykernels
from pykernels.cli.errors import fail
from pykernels.cli.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Mean,
    Model,
    Std,
    bar,
    columns,
    device_of,
    hush,
    inputs_in,
    load_with_example,
)
from pykernels.cuda import registry

_LATER = {
    "bench": "pykernels.bench.command:bench",
    "compress": "pykernels.cli.compress:compress",
    "part": "pykernels.cli.parallel:part",
    "serve": "pykernels.cli.serve:serve",
    "split": "pykernels.cli.parallel:split",
    "tune": "pykernels.cli.tune:tune",
    "plan": "pykernels.cli.plan:app",
    "comm": "pykernels.parallel.command:app",
}
_LOOKS: dict[str, Any] = {
    "add_completion": False, "rich_markup_mode": "rich", "pretty_exceptions_show_locals": False,
}  # fmt: skip


class Commands(typer.core.TyperGroup):
    """The commands. Most are imported when they are asked for: a server need not wait for the benchmarks' rivals."""

    def list_commands(self, context: Any) -> list[str]:
        return [*super().list_commands(context), *_LATER]

    def get_command(self, context: Any, name: str) -> Any:
        if name not in _LATER:
            return super().get_command(context, name)
        module, _, attribute = _LATER[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(**_LOOKS)
            found.command()(function)
        command = typer.main.get_command(found)
        command.name = name
        return command


app = typer.Typer(
    name="pykernels",
    cls=Commands,
    help="Make PyTorch models faster on the hardware at hand: hand-written kernels, model surgery, int8.",
    no_args_is_help=True,
    **_LOOKS,
)


class Precision(str, enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"
    auto = "auto"


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(pykernels.__version__)
        raise typer.Exit


@app.command()
def doctor() -> None:
    """Tell what this installation can do here, and why not more.

    The processor's features and the kernels chosen for it, torch, threads, the CUDA library, and for each op where it
    runs. Leaves with status 1 when the CPU library is not usable.
    """
    from pykernels.bench import machine as machines

    found = machines.machine()
    console = Console()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("pykernels", f"{pykernels.__version__}{_build(found.build)}")
    facts.add_row("python", f"{sys.version.split()[0]} ({sys.executable})")
    facts.add_row("torch", f"{found.torch}{', with CUDA' if torch.cuda.is_available() else ''}")
    facts.add_row("processor", f"{found.cpu}, {found.cores} logical cores")
    facts.add_row("threads", f"{found.threads} [dim](torch.set_num_threads or OMP_NUM_THREADS changes it)[/]")
    facts.add_row(
        "isa", f"[green]{found.isa}[/], {found.isa_reason}" if found.isa else f"[red]none[/], {found.isa_reason}"
    )
    if found.isas:
        facts.add_row("", "  ".join(f"{name} {_tick(runs)}" for name, runs in found.isas.items()))
    facts.add_row("CPU ops", _tick(found.cpu_error is None, found.cpu_error))
    facts.add_row("CUDA ops", _tick(found.cuda_error is None, found.cuda_error))
    facts.add_row("CUDA library", _tick(found.cuda_library_error is None, found.cuda_library_error))
    console.print(facts)

    ops = machines.op_support()
    if ops:
        table = Table(title="torch.ops.pykernels", title_justify="left", title_style="bold", header_style="bold")
        table.add_column("op")
        for column in ("CPU", "CUDA", "gradients"):
            table.add_column(column, justify="center")
        table.caption, table.caption_justify = registry.UNMEASURED, "left"
        for op in ops:
            table.add_row(op.name, _tick(op.cpu), _tick(op.cuda), _tick(op.gradients))
        console.print()
        console.print(table)
    if found.cpu_error is not None:
        raise typer.Exit(1)


@app.command()
def optimize(
    model: Model,
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Where the optimized network is saved.")],
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of the example input, batch first: 1,3,224,224. Several inputs: separate with ';'. "
            "Not needed for an ONNX file that leaves no size but the batch's free."
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="What the network computes in.")] = Precision.fp32,
    calibration: Annotated[
        pathlib.Path | None,
        typer.Option(help="int8, auto: a folder of images, or of .pt/.npy batches, like the usual inputs."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many files of the calibration folder to use.")] = 200,
    mean: Mean = IMAGENET_MEAN,
    std: Std = IMAGENET_STD,
    device: Annotated[
        str, typer.Option(help="Where to optimize and calibrate: cpu, cuda or cuda:1. The file serves every device.")
    ] = "cpu",
    tune: Annotated[
        bool,
        typer.Option("--tune", help="On the CPU, time ways to cut each layer into tasks, and keep the best."),
    ] = False,
    error: Annotated[
        float | None,
        typer.Option(help="auto: the relative error that int8 may make of the answers to the calibration inputs; 0.1."),
    ] = None,
) -> None:
    """Fuse a network onto our kernels, in fp32, bf16, fp16 or int8, or auto: each step in the quicker one within an
    error, and save it.

    Prints each fused group, and each part left to torch with the reason.

    [cyan]pykernels optimize nets:resnet18 --input-shape 1,3,224,224 --precision int8 --calibration photos/ -o net.pk[/]
    """
    if calibration is not None and precision not in (Precision.int8, Precision.auto):
        fail("--calibration is only for --precision int8 and auto")
    if error is not None and precision is not Precision.auto:
        fail("--error is only for --precision auto")
    if calibration is None and precision is Precision.auto:
        fail("--precision auto needs --calibration")
    if not output.parent.is_dir():
        fail(f"--output: the folder {output.parent} does not exist")
    place = device_of(device)
    torch.manual_seed(0)
    network, examples = load_with_example(model, input_shape, place)
    inputs = None
    if calibration is not None:
        if len(examples) != 1:
            fail("--calibration serves networks of one input; call pykernels.optimize from Python for others")
        inputs = list(inputs_in("--calibration", calibration, samples, list(examples[0].shape), mean, std))
    hush()
    console = Console(stderr=True)
    with Progress(*columns(), console=console) as progress:
        what = f"optimizing {model} to {precision.value}"
        task = progress.add_task(what, total=None)
        try:
            fast = pykernels.optimize(
                network,
                examples,
                precision=precision.value,
                calibration=inputs,
                progress=bar(progress, task, what),
                tune=tune,
                budget=None if error is None else {"error": error},
            )
            progress.update(task, description=f"saving {output}", total=None)
            fast.save(output)
        except (RuntimeError, ValueError, TypeError, ImportError) as failure:
            progress.stop()
            fail(str(failure))
    print(fast.report())
    console.print(
        f"saved [bold]{output}[/] ({output.stat().st_size / 1e6:.1f} MB): net = pykernels.load({str(output)!r})"
    )


def _build(build: dict[str, str]) -> str:
    parts = [build.get("compiler", "")]
    parts += [f"emulates {build['emulated']}"] if build.get("emulated") else []
    parts += [f"sanitizers {build['sanitizers']}"] if build.get("sanitizers") else []
    text = ", ".join(part for part in parts if part)
    return f" [dim]({text})[/]" if text else ""


def _tick(good: bool, reason: str | None = None) -> str:
    if good:
        return "[green]yes[/]"
    return f"[yellow]no[/]: {reason}" if reason else "[dim]no[/]"

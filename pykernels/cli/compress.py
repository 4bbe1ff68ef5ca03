"""The command `pykernels compress`: a model made smaller and quicker until it keeps a budget."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import pykernels
from pykernels.cli.errors import fail
from pykernels.cli.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    InputShape,
    Mean,
    Model,
    Std,
    bar,
    columns,
    hush,
    inputs_in,
    load_model,
    named,
    shapes_of,
)
from pykernels.compress import Interrupted, Stopped

BATCH = 10
"""Images of a folder that are one entry of the data."""
CHARTS = (".png", ".svg")


def compress(
    model: Model,
    input_shape: InputShape,
    output: Annotated[
        pathlib.Path,
        typer.Option("--output", "-o", help="Where the network is saved; beside it, as .json, the recipe."),
    ],
    latency: Annotated[
        float | None, typer.Option(help="The part of the original's time in fp32 that a call may take: 0.5.")
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(help="How much lower accuracy (or agreement) may be; 0.01 where no latency is given."),
    ] = None,
    data: Annotated[
        pathlib.Path | None,
        typer.Option(help="A folder of images, or of .pt/.npy batches, like the usual inputs; labels are not needed."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="module:callable or file.py:callable that returns a loader to learn from."),
    ] = None,
    validate: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="A function of a network that returns its accuracy, the higher the better."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of distillation, for each network that is tried; 1000.")] = None,
    rounds: Annotated[int, typer.Option(min=0, help="How many pruned networks are tried at most.")] = 4,
    recipe: Annotated[
        pathlib.Path | None, typer.Option(help="Do what an earlier call did: its .json, in place of a search.")
    ] = None,
    checkpoint: Annotated[
        pathlib.Path | None, typer.Option(help="A folder for what is reached; the same call goes on from there.")
    ] = None,
    weights: Annotated[
        pathlib.Path | None, typer.Option(help="Where the smaller model's weights are saved, a state dict (.pt).")
    ] = None,
    chart: Annotated[
        pathlib.Path | None, typer.Option(help="Draw quality against latency to this .svg or .png.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many files of the data folder to use.")] = 200,
    mean: Mean = IMAGENET_MEAN,
    std: Std = IMAGENET_STD,
) -> None:
    """Make a network smaller and quicker until it keeps a budget: int8, precisions by step, pruned, distilled.

    Prints what was tried, and saves the network. A budget that cannot be kept is an error; what was reached is saved.

    [cyan]pykernels compress nets.py:resnet18 --input-shape 1,3,224,224 --data photos/ --latency 0.3 -o net.pk[/]
    """
    for option, path in (("--output", output), ("--weights", weights), ("--chart", chart)):
        if path is not None and not path.parent.is_dir():
            fail(f"{option}: the folder {path.parent} does not exist")
    if chart is not None and chart.suffix.lower() not in CHARTS:
        fail(f"--chart: {chart} must end in {' or '.join(CHARTS)}")
    if model.endswith(".onnx"):
        fail("MODEL: compress prunes and trains modules, and an ONNX file has none; `pykernels optimize` takes it")
    shapes = shapes_of(input_shape)
    torch.manual_seed(0)
    network = load_model(model, torch.device("cpu"))
    options: dict[str, Any] = {"steps": steps, "rounds": rounds, "checkpoint": checkpoint}
    given = {"latency": latency, "drop": drop}
    options["budget"] = {name: value for name, value in given.items() if value is not None} or None
    if data is not None:
        if len(shapes) != 1:
            fail("--data serves networks of one input; call pykernels.compress from Python for others")
        options["data"] = _batches(list(inputs_in("--data", data, samples, shapes[0], mean, std)))
    if train is not None:
        made = named("--train", train)
        options["train"] = made() if callable(made) else made
    if validate is not None:
        options["validate"] = named("--validate", validate)
    if recipe is not None:
        options["recipe"] = _read(recipe)
    examples = tuple(torch.randn(shape) for shape in shapes)
    hush()
    console = Console(stderr=True)
    stopped, status = "", 0
    with Progress(*columns(), console=console, transient=True) as progress:
        task = progress.add_task("compressing", total=None)
        try:
            result = pykernels.compress(
                network, examples, **options, progress=bar(progress, task, f"compressing {model}")
            )
        except Stopped as error:
            result, stopped, status = error.result, _option(str(error)), 1
        except Interrupted as error:
            result, stopped, status = error.result, "interrupted", 130
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            progress.stop()
            fail(_option(str(error)))
    print(result.report())
    _save(result, output, weights, chart)
    console.print(f"saved [bold]{output}[/] ({output.stat().st_size / 1e6:.1f} MB) and {output.with_suffix('.json')}")
    if status:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {stopped}", highlight=False)
        raise typer.Exit(status)


def _batches(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Files as entries: single images are put together."""
    if any(len(x) > 1 for x in inputs):
        return inputs
    return [torch.cat(inputs[place : place + BATCH]) for place in range(0, len(inputs), BATCH)]


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"--recipe: {path} cannot be read: {error}")


def _save(
    result: pykernels.Compressed, output: pathlib.Path, weights: pathlib.Path | None, chart: pathlib.Path | None
) -> None:
    try:
        result.network.save(output)
        output.with_suffix(".json").write_text(json.dumps(result.recipe))
        if weights is not None:
            torch.save(result.model.state_dict(), weights)
    except (OSError, ValueError) as error:
        fail(f"--output: {error}")
    if chart is not None:
        try:
            result.report().draw(chart)
        except ModuleNotFoundError as error:
            fail(f"--chart: {error}")


def _option(message: str) -> str:
    """An error of `pykernels.compress`, by the option's name."""
    for name in ("data", "train", "validate", "recipe", "checkpoint", "steps"):
        if message.startswith(f"{name}:"):
            return f"--{message}"
    for name in ("latency", "drop"):
        if message.startswith(f"budget: '{name}' is"):
            return message.replace(f"budget: '{name}' is", f"--{name}:", 1)
    return message

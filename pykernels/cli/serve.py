"""The command `pykernels serve`: networks behind HTTP and gRPC."""

from __future__ import annotations

import gc
import importlib.util
import ipaddress
import logging
import os
import pathlib
import tempfile
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import pykernels
from pykernels.cli.errors import fail
from pykernels.cli.model import bar, columns, device_of, load_with_example
from pykernels.graph.qdq import has_quantizers
from pykernels.tune.cores import usable

if TYPE_CHECKING:
    from pykernels.serve.service import Options

NEEDED = ("grpc", "prometheus_client", "pydantic", "starlette", "tritonclient", "uvicorn", "uvloop")
console = Console(stderr=True, soft_wrap=True)


def serve(
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="NETWORKS",
            help="Saved networks, each FILE or NAME=FILE; or one folder of NAME/VERSION/net.pk; or one ONNX file or "
            "model.py:callable (or module:callable), which is optimized first. A folder that `pykernels split` wrote "
            "stands for a file.",
        ),
    ],
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Calls at once, each on cores of its own; all cores without it. On Ray with --device cuda: processes, "
            "by default as many as the GPUs hold.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one call; 1.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="The most rows of one call; 16.")] = None,
    setup: Annotated[
        pathlib.Path | None, typer.Option(help="What `pykernels tune -o` wrote: replicas, threads, batch and device.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; cuda:1 with --in-process. The setup's, or cpu, without it.")
    ] = None,
    gpus_per_replica: Annotated[
        float, typer.Option(help="On Ray with --device cuda: 0.5 puts two replicas on each GPU.")
    ] = 1.0,
    batch_error: Annotated[
        float,
        typer.Option(
            help="Batches are formed where answers differ from single ones by at most so much of the largest value; 0: "
            "where they have the same bits."
        ),
    ] = 0.0,
    p99_ms: Annotated[
        float | None, typer.Option(help="Milliseconds in which answers are wanted: batches wait no longer for rows.")
    ] = None,
    host: Annotated[str, typer.Option(help="The interface to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of HTTP; 0 chooses a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Of gRPC; 0 chooses a free one.")] = 8001,
    token_file: Annotated[
        pathlib.Path | None, typer.Option(help="Holds a token that every request but those for health must bring.")
    ] = None,
    control: Annotated[bool, typer.Option("--control", help="Clients may load and unload models.")] = False,
    queue: Annotated[
        int, typer.Option(min=1, help="How many requests of a model, or jobs, may wait; more get 429.")
    ] = 256,
    jobs: Annotated[
        str | None,
        typer.Option(help="redis://HOST:PORT/NUMBER takes jobs: requests that are submitted, polled and fetched."),
    ] = None,
    request_mb: Annotated[int, typer.Option(min=1, help="The most of one request, decompressed.")] = 64,
    mapped_mb: Annotated[int, typer.Option(min=1, help="The most of the files of networks that are mapped.")] = 16384,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Of a model that is optimized first: shape of an example, 1,3,224,224; several inputs: with ';'. "
            "An ONNX file may say it itself."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of a model that is optimized first: fp32, bf16, fp16.")] = "fp32",
    in_process: Annotated[
        bool, typer.Option("--in-process", help="In this process, without Ray: nobody starts it again when it dies.")
    ] = False,
    write_config: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Serve nothing; write serve.yaml, rayservice.yaml, nginx.conf, grpc-client.json and Dockerfile to "
            "this folder."
        ),
    ] = None,
) -> None:
    """Serve networks over HTTP and gRPC until ^C or SIGTERM, which lets what was asked be answered.

    Open Inference Protocol v2 (NVIDIA's tritonclient, KServe), TensorFlow Serving's REST form, SageMaker's /ping and
    /invocations, Prometheus's /metrics. Only this machine is listened to unless --host says otherwise.

    [cyan]pykernels serve resnet=resnet.pk detector=det.pk --replicas 4 --threads 1 --max-batch 16 --p99-ms 50[/]
    """
    gc.freeze()  # what torch brought stays; to look through it again and again would cost a tenth of the start
    if in_process and jobs is not None:
        fail("--jobs: is for Ray Serve, not for --in-process")
    needed = NEEDED if jobs is None else (*NEEDED, "celery", "redis")
    _needs((*needed, "yaml") if write_config is not None else needed if in_process else (*needed, "ray"))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("pykernels").setLevel(logging.INFO)
    from pykernels.serve.files import parts_in
    from pykernels.serve.service import Options, Token

    with tempfile.TemporaryDirectory(prefix="pykernels-") as scratch:
        try:
            Token(token_file)
            models, unmade = _models(networks, None if write_config else pathlib.Path(scratch))
            parts = parts_in(models)
            sizes = _sizes(setup, threads, replicas, max_batch, device, parts, gpus_per_replica, in_process)
            if write_config is None:
                _check_device(sizes, gpus_per_replica, in_process)
            options = Options(
                models=models,
                parts=parts,
                threads=sizes.threads,
                instances=sizes.instances,
                batch=sizes.batch,
                device=sizes.device,
                gpus=gpus_per_replica,
                batch_error=batch_error,
                p99_ms=p99_ms,
                queue=queue,
                request_bytes=request_mb << 20,
                memory_bytes=max(request_mb << 20, 1 << 30),
                mapped_bytes=mapped_mb << 20,
                token_file=None if token_file is None else str(token_file.resolve()),
                control=control,
                jobs=jobs,
            )
        except (OSError, ValueError) as error:
            fail(_option(str(error)))
        if write_config is not None:
            _write(write_config, options, sizes.replicas, port, grpc_port)
            return
        for model, file in unmade.items():  # last: it may take minutes
            _optimize(model, input_shape, precision, file)
        if token_file is None and not _loopback(host):
            console.print("[yellow]--host lets others in, and without --token-file they need no token[/]")
        try:
            _run(options, sizes.replicas, host, port, grpc_port, in_process)
        except (OSError, ValueError) as error:
            fail(_option(str(error)))


def _run(options: Options, replicas: int, host: str, port: int, grpc_port: int, in_process: bool) -> None:
    def started(http: int, grpc: int) -> None:
        place = f"[{host}]" if ":" in host else host
        print(f"http://{place}:{http}  grpc://{place}:{grpc}", flush=True)

    if not in_process and 0 in (port, grpc_port):
        fail("--port, --grpc-port: 0 is for --in-process")

    if in_process:
        from pykernels.serve.in_process import serve as serve_here

        serve_here(options, host, port, grpc_port, started)
        return
    from pykernels.serve.environment import ENVIRONMENT

    for name, value in ENVIRONMENT.items():  # Ray reads them when it is imported
        os.environ.setdefault(name, value)
    from pykernels.serve.engine import run

    run(options, replicas, host, port, grpc_port, started)


def _write(folder: pathlib.Path, options: Options, replicas: int, port: int, grpc_port: int) -> None:
    from pykernels.serve.manifests import write

    try:
        found = write(folder, options, replicas, port, grpc_port)
    except OSError as error:
        fail(f"--write-config: {error}")
    console.print(f"wrote {', '.join(map(str, found))}")


def _needs(modules: tuple[str, ...]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"serve: {', '.join(missing)} is missing: pip install 'pykernels[serve]'")


class _Sizes(NamedTuple):
    """Threads of a call, calls at once in a process, processes; the most rows of a call; where."""

    threads: int
    instances: int
    replicas: int
    batch: int
    device: str


def _sizes(
    file: pathlib.Path | None,
    threads: int | None,
    replicas: int | None,
    batch: int | None,
    device: str | None,
    parts: int,
    gpus: float,
    in_process: bool,
) -> _Sizes:
    """As the options say, else as the setup does, else all cores (of a GPU's process two calls at once) and 16."""
    instances = None
    if file is not None:
        try:
            found = pykernels.Setup.load(file)
        except (OSError, ValueError) as error:
            fail(f"--setup: {str(error).removeprefix('path: ')}")
        threads, instances, batch = threads or found.threads, found.instances, batch or found.batch
        if len({name.partition(":")[0] for name in (device, found.device) if name is not None}) > 1:
            fail(f"--device: the setup is one for {found.device}, not for {device}")
        device = device or found.device
    threads, batch, device = threads or 1, batch or 16, device or "cpu"
    cores = max(1, usable().count // (threads * parts))
    if in_process:
        at_once = replicas or instances or (cores if device == "cpu" else min(2, cores))
        return _Sizes(threads, at_once, 1, batch, device)
    if device == "cpu":
        return _Sizes(threads, 1, replicas or instances or cores, batch, device)
    from pykernels.serve.service import on_a_gpu

    if ":" in device:
        fail(f"--device: on Ray it is cuda, and Ray says which, not {device}")
    replicas = replicas or max(1, torch.cuda.device_count() * on_a_gpu(gpus))
    return _Sizes(threads, instances or max(1, min(2, cores // replicas)), replicas, batch, device)


def _check_device(sizes: _Sizes, gpus: float, in_process: bool) -> None:
    """What is not there is told before anything starts."""
    from pykernels.serve.service import on_a_gpu

    device_of(sizes.device)
    most = torch.cuda.device_count() * on_a_gpu(gpus)
    if sizes.device != "cpu" and not in_process and sizes.replicas > most:
        fail(f"--replicas: {sizes.replicas} of {gpus:g} GPUs each are more than the {most} that fit here")


def _models(networks: list[str], scratch: pathlib.Path | None) -> tuple[str | dict[str, str], dict[str, pathlib.Path]]:
    """What is served, a folder or files by name; and what is optimized first, with its files, still empty."""
    if len(networks) == 1 and pathlib.Path(networks[0]).is_dir() and not _split(pathlib.Path(networks[0])):
        return str(pathlib.Path(networks[0]).resolve()), {}
    found: dict[str, str] = {}
    unmade: dict[str, pathlib.Path] = {}
    for network in networks:
        name, separator, place = network.partition("=")
        if not separator:
            name, place = pathlib.Path(network.partition(":")[0]).stem, network
        if name in found:
            fail(f"NETWORKS: {name!r} is there twice; NAME=FILE gives another name")
        path = pathlib.Path(place)
        if (path.suffix == ".onnx" and path.is_file()) or (not path.is_file() and ":" in place):
            if scratch is None:
                fail(f"--write-config: {place} would be optimized on every node; `pykernels optimize` saves it once")
            path = unmade.setdefault(place, scratch / f"{len(unmade)}.pk")
            path.touch()
        elif path.suffix == ".py":
            fail(f"NETWORKS: {place}: which callable returns the model? {place}:make, say")
        elif not path.is_file() and not _split(path):
            fail(f"NETWORKS: there is no file {place}")
        found[name] = str(path.resolve())
    return found, unmade


def _split(path: pathlib.Path) -> bool:
    """Whether it is a folder of parts."""
    from pykernels.parallel.split import NAME

    return path.is_dir() and any(NAME.fullmatch(file.name) for file in path.iterdir())


def _optimize(model: str, input_shape: str | None, precision: str, path: pathlib.Path) -> None:
    if precision not in ("fp32", "bf16", "fp16"):
        fail(f"--precision: {precision} is none of fp32, bf16, fp16; `pykernels optimize` calibrates for others")
    network, examples = load_with_example(model, input_shape, torch.device("cpu"))
    if has_quantizers(network):
        precision = "int8"
    with Progress(*columns(), console=console, transient=True) as progress:
        what = f"optimizing {model} to {precision}"
        task = progress.add_task(what, total=None)
        try:
            fast = pykernels.optimize(network, examples, precision, progress=bar(progress, task, what))
            fast.save(path)
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            progress.stop()
            fail(f"NETWORKS: {model}: {error}")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _option(message: str) -> str:
    """An error of the service, by the option's name."""
    names = {
        "models": "NETWORKS",
        "setup": "--replicas, --threads",
        "p99_ms": "--p99-ms",
        "token_file": "--token-file",
        "jobs": "--jobs",
        "device": "--device",
        "gpus": "--gpus-per-replica",
        "batch_error": "--batch-error",
        "host and port": "--host, --port",
    }
    name, separator, rest = message.partition(": ")
    return f"{names[name]}: {rest}" if separator and name in names else message

"""The commands `pykernels split` and `pykernels part`: a saved network in parts, and one of them on this host."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time
from typing import Annotated

import typer

import pykernels
from pykernels.cli.errors import fail
from pykernels.cli.network import Network, inputs_like, load

PAUSE = 1.0  # seconds until a part that ended is started again


def split(
    network: Network,
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="The folder for the parts' files.")],
    stages: Annotated[int, typer.Option(min=1, help="How many parts.")] = 2,
    batch: Annotated[
        int | None, typer.Option(min=1, help="The batch size that is balanced; the example's without.")
    ] = None,
    mbit: Annotated[
        float | None, typer.Option(min=1e-3, help="Mbit/s of the slowest link; without, parts are on one machine.")
    ] = None,
) -> None:
    """Cut a saved network into parts that run as a pipeline of processes, balanced by measured step times.

    [cyan]pykernels split net.pk --stages 4 -o parts[/]
    """
    from pykernels.parallel.split import split as cut

    fast = load(network)
    try:
        parts = cut(fast, stages, inputs_like(fast, batch), None if mbit is None else 1e6 * mbit)
        parts.save(output)
    except (ValueError, OSError) as error:
        fail(str(error))
    print(parts)


def part(
    file: Annotated[pathlib.Path, typer.Argument(help="Of the part, as `pykernels split` wrote it.")],
    listen: Annotated[str, typer.Option(help="host:port for the part before it, or for who asks.")],
    following: Annotated[
        str, typer.Option("--next", help="host:port of the part behind it; of the last, where who asks listens.")
    ],
    threads: Annotated[int, typer.Option(min=1, help="Of torch's.")] = 1,
    silence: Annotated[float, typer.Option(min=0.1, help="Seconds after which a link is given up.")] = 5.0,
    device: Annotated[str, typer.Option(help="Where it runs: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Run one part of a network on this host, and start it again when it ends. All hosts have the same 64 hexadecimal
    digits in PYKERNELS_PIPELINE_KEY (``openssl rand -hex 32``).

    [cyan]pykernels part parts/part-1-of-2.pk --listen 0.0.0.0:9001 --next second:9002[/]
    """
    from pykernels.parallel.link import host_of, key_of_environment
    from pykernels.parallel.processes import checked_device
    from pykernels.parallel.split import Place

    try:
        network = pykernels.load(file)
    except (OSError, ValueError) as error:
        fail(f"FILE: {str(error).removeprefix('path: ')}")
    try:
        number = Place.of(network).number
    except ValueError:
        fail(f"FILE: {file} is no part of a network that was split")
    try:
        host_of(listen), host_of(following), key_of_environment(), checked_device("--device", device)
    except ValueError as error:
        fail(str(error))
    command = [
        *(sys.executable, "-m", "pykernels.parallel.part", str(file), "--listen", listen, "--next", following),
        *("--threads", str(threads), "--silence", str(silence)),
        *("--device", device, "--with-parent"),
    ]
    while True:
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            code = process.wait()
        print(f"part {number} ended with {code}; it is started again", file=sys.stderr, flush=True)
        time.sleep(PAUSE)

"""Which files hold the networks that a service has: one each, or one for each part of a network that is split."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pykernels.parallel.split import NAME as PART
from pykernels.parallel.split import files_in

__all__ = ["FILE", "VERSION", "Files", "find", "parts_in", "source_of"]

FILE = "net.pk"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
VERSION = re.compile(r"[1-9][0-9]{0,17}")


class Files(NamedTuple):
    """Of one version of a model.

    Attributes:
        path: the file, or the folder of the parts' files.
        identity: of their content, as far as the file system tells.
        bytes: of all of them.
    """

    path: Path
    identity: tuple[tuple[int, int, int], ...]
    bytes: int

    @classmethod
    def of(cls, path: Path) -> Files:
        """Of a file or a folder of parts.

        Raises:
            FileNotFoundError: it is gone.
            ValueError: parts are missing.
        """
        status = [os.stat(file) for file in (files_in(path) if path.is_dir() else [path])]
        return cls(path, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in status), sum(s.st_size for s in status))


def source_of(models: str | Mapping[str, str]) -> Path | dict[str, Path]:
    """`Options.models` as paths."""
    return Path(models) if isinstance(models, str) else {name: Path(file) for name, file in models.items()}


def find(source: Path | Mapping[str, Path]) -> dict[tuple[str, int], Files]:
    """The files in a folder, or those that were named, by name and version.

    Raises:
        ValueError: a name that is none, or a folder that was named without all parts of a network.
        FileNotFoundError: a file that was named is not there.
    """
    found = {}
    for key, path in (_inside(source) if isinstance(source, Path) else _named(source)).items():
        with contextlib.suppress(FileNotFoundError):  # gone since
            found[key] = Files.of(path)
    return found


def parts_in(models: str | Mapping[str, str]) -> int:
    """How many parts the network that is split most has; 1 where none is split.

    Args:
        models: as of `Options`.

    Raises:
        ValueError, FileNotFoundError: as `find`.
    """
    return max((len(files.identity) for files in find(source_of(models)).values()), default=1)


def _inside(folder: Path) -> dict[tuple[str, int], Path]:
    """``name/version/net.pk``, or the folder ``name/version`` with all parts of a network; what is named otherwise, or
    lies outside by a link, is left out."""
    root = folder.resolve()
    found = {}
    for place in folder.glob("*/*"):
        key = place.parent.name, place.name
        if not NAME.fullmatch(key[0]) or not VERSION.fullmatch(key[1]) or not place.is_dir():
            continue
        file = place / FILE
        parts = [] if file.is_file() else [path for path in place.iterdir() if PART.fullmatch(path.name)]
        if not all(path.resolve().is_relative_to(root) and path.is_file() for path in parts or [file]):
            continue
        with contextlib.suppress(ValueError):  # the other parts are still to come
            found[key[0], int(key[1])] = place if parts and files_in(place) else file
    return found


def _named(files: Mapping[str, Path]) -> dict[tuple[str, int], Path]:
    """Files that were named one by one, each version 1."""
    for name, path in files.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"models: {name!r} is no name: letters, digits, '_', '-' and '.' make one")
        if not path.exists():
            raise FileNotFoundError(f"models: {name}: there is no file {path}")
        if path.is_dir():
            try:
                files_in(path)
            except ValueError as error:
                raise ValueError(f"models: {name}: {str(error).removeprefix('folder: ')}") from None
    return {(name, 1): path for name, path in files.items()}

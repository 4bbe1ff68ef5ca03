"""What a search has reached, in a folder: a search that was cut off goes on from there.

search.json        what the search is for, rows of the report, recipes
student-KEY.pt     weights of a pruned (and distilled) model: tensors alone, read by ``torch.load(weights_only=True)``
network-KEY.pk     networks, as `Optimized.save` writes them
training.pt        the student that is being distilled: step, weights, optimizer
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pykernels.optimized import Optimized, load

from .report import Row

__all__ = ["Checkpoint", "fingerprint"]

VERSION = 1


def fingerprint(model: nn.Module) -> str:
    """Of names, shapes, dtypes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Checkpoint:
    """A folder that a search writes into; without a folder nothing is kept.

    Args:
        identity: what the search is for: another one does not go on with this folder.

    Raises:
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else pathlib.Path(folder)
        wanted = json.loads(json.dumps(dict(identity)))
        self.state: dict[str, Any] = {
            "version": VERSION, "identity": wanted, "rows": {}, "students": {}, "refused": {},
        }  # fmt: skip
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint: {self.folder} is no folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "search.json"
        if not path.exists():
            self._write()
            return
        try:
            found = json.loads(path.read_text())
            others = [name for name, value in wanted.items() if found["identity"].get(name) != value]
            complete = found["version"] == VERSION and all(
                isinstance(found[name], dict) for name in ("rows", "students", "refused")
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint: {path} cannot be read: {error}") from None
        if not complete or others:
            what = f"its {', '.join(others)} differ" if others else f"it is not of version {VERSION}"
            raise ValueError(f"checkpoint: {self.folder} holds another search ({what}); give another folder")
        self.state = found

    # --- rows and their networks ---

    def row(self, key: str) -> tuple[Row, Optimized] | None:
        """A row with its network, if it was reached."""
        if self.folder is None or key not in self.state["rows"]:
            return None
        try:
            return Row(**self.state["rows"][key]), load(self.folder / f"network-{key}.pk")
        except (TypeError, OSError, ValueError) as error:
            raise ValueError(f"checkpoint: {self.folder}: {error}") from error

    def keep_row(self, key: str, row: Row, network: Optimized) -> None:
        if self.folder is not None:
            network.save(self.folder / f"network-{key}.pk")
            self.state["rows"][key] = dataclasses.asdict(row)
            self._write()

    # --- students ---

    def student(self, key: str) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]] | None:
        """The recipe that a student was pruned by, and its weights in the end, if they were reached."""
        if self.folder is None or key not in self.state["students"]:
            return None
        return self.state["students"][key], self._read(f"student-{key}.pt")

    def keep_student(self, key: str, recipe: Mapping[str, Any], model: nn.Module) -> None:
        if self.folder is not None:
            self._save(f"student-{key}.pt", dict(model.state_dict()))
            self.state["students"][key] = dict(recipe)
            self._write()

    def refused(self, key: str) -> str | None:
        """Why a student could not be made, if that is known."""
        found: str | None = self.state["refused"].get(key)
        return found

    def refuse(self, key: str, why: str) -> None:
        self.state["refused"][key] = why
        self._write()

    # --- a student that is being distilled ---

    def training(self, key: str) -> Mapping[str, Any] | None:
        """Step, weights and optimizer of a student that was being distilled."""
        if self.folder is None or not (self.folder / "training.pt").exists():
            return None
        found = self._read("training.pt")
        return found if found.get("key") == key else None

    def keep_training(self, key: str, content: Mapping[str, Any]) -> None:
        if self.folder is not None:
            self._save("training.pt", {"key": key, **content})

    # --- files: what was there stays until the new one is whole ---

    def _read(self, name: str) -> Mapping[str, Any]:
        assert self.folder is not None
        try:
            found: Mapping[str, Any] = torch.load(self.folder / name, map_location="cpu", weights_only=True)
            return found
        except Exception as error:  # torch tells damage by many types
            raise ValueError(f"checkpoint: {self.folder / name} cannot be read: {error}") from error

    def _save(self, name: str, content: Mapping[str, Any]) -> None:
        assert self.folder is not None
        torch.save(content, self.folder / f"{name}.new")
        os.replace(self.folder / f"{name}.new", self.folder / name)

    def _write(self) -> None:
        if self.folder is not None:
            (self.folder / "search.json.new").write_text(json.dumps(self.state, indent=1))
            os.replace(self.folder / "search.json.new", self.folder / "search.json")

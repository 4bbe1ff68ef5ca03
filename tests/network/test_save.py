"""Saved networks: one file, no Python class needed, and nothing else is mistaken for one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import Mixed, lively

import pykernels as pk


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, pk.Optimized]:
    fast = pk.optimize(lively(Mixed(), 3, 12, 12), torch.randn(2, 3, 12, 12))
    path = tmp_path_factory.mktemp("saved") / "net.pk"
    fast.save(path)
    return path, fast


@pytest.mark.parametrize("batch", [1, 3])
def test_a_loaded_network_answers_to_the_bit_for_any_batch(saved, batch) -> None:
    path, fast = saved
    again, x = pk.load(path), torch.randn(batch, 3, 12, 12)
    assert torch.equal(again(x), fast(x))
    assert again.report() == fast.report() and again.dynamic


def test_loading_needs_no_class_of_the_model(saved) -> None:
    path, fast = saved
    x = torch.ones(2, 3, 12, 12)
    code = f"import torch, pykernels as pk; print(pk.load({str(path)!r})(torch.ones(2, 3, 12, 12)).sum().item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(fast(x).sum().item(), rel=1e-6)


def test_a_loaded_network_can_be_saved_again(saved, tmp_path) -> None:
    path, fast = saved
    pk.load(path).save(tmp_path / "again.pk")
    x = torch.randn(4, 3, 12, 12)
    assert torch.equal(pk.load(tmp_path / "again.pk")(x), fast(x))


def test_any_name_will_do_without_a_word_from_torch(tmp_path, caplog) -> None:
    fast = pk.optimize(lively(Mixed(), 3, 12, 12), torch.randn(2, 3, 12, 12))
    with caplog.at_level("WARNING"):
        fast.save(tmp_path / "net.pk")
        pk.load(tmp_path / "net.pk")
    assert not [record for record in caplog.records if "pt2" in record.getMessage()]


def test_a_save_that_fails_leaves_what_was_there(saved, tmp_path, monkeypatch) -> None:
    path, fast = tmp_path / "net.pk", saved[1]
    path.write_bytes(b"the network of yesterday")

    def full(program, file, **_) -> None:
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="no space"):
        fast.save(path)
    assert path.read_bytes() == b"the network of yesterday" and list(tmp_path.iterdir()) == [path]


def test_a_truncated_altered_or_foreign_file_is_refused(saved, tmp_path) -> None:
    path, _ = saved
    data, bad = path.read_bytes(), tmp_path / "bad.pk"
    middle = len(data) // 3
    for content in (
        b"",
        b"hello",
        data[: len(data) // 2],
        data[:-10],
        data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.pk"):
            pk.load(bad)
    torch.save({"a": torch.ones(3)}, bad)
    with pytest.raises(ValueError, match=r"bad\.pk"):
        pk.load(bad)
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(2),)), bad)
    with pytest.raises(ValueError, match="without the part that pykernels adds"):
        pk.load(bad)
    with pytest.raises(FileNotFoundError):
        pk.load(tmp_path / "none.pk")


def test_an_optimized_network_exports_and_compiles_as_a_whole(saved) -> None:
    _, fast = saved
    x = torch.randn(2, 3, 12, 12)
    program = torch.export.export(fast, (x,))
    assert torch.equal(program.module()(x), fast(x))
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))

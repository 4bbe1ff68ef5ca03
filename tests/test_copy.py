"""The copy driver (csrc/cpu/copy) copies and fills what plain loops do: tests/cpp/copy_test.cpp, built and run here."""

from __future__ import annotations

import pathlib

from executables import buildable, report

pytestmark = buildable


def test_copies_and_fills_of_random_shapes_and_strides(tmp_path: pathlib.Path) -> None:
    assert report("copy_test", tmp_path) == ["1000 copies, 0 differences"]

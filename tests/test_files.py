"""Files that are complete or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from courier_fast.files import write_atomically
from courier_fast.output import INDEX, write_folder


def test_a_file_is_flushed_without_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe in the folder of an output was opened, and waited for; so was every other file beneath
    it."""
    (tmp_path / "photos").mkdir()
    for i in range(9):
        (tmp_path / "photos" / f"{i}.jpg").write_text("x")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    write_atomically(tmp_path / "out.txt", lambda path: path.write_text("text"))
    assert flushed == [(tmp_path / "out.txt").stat().st_ino, tmp_path.stat().st_ino]


def test_a_folder_is_flushed_with_all_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("text")
        (folder / "b").write_text("text")

    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    out = tmp_path / "out"
    write_folder(out, INDEX, write)
    every = [out, out / "b", out / "inner", out / "inner" / "a", tmp_path]
    assert {path.stat().st_ino for path in every} <= set(flushed)

"""What a command may write over: nothing but an empty folder, or what this package wrote; never
what it reads."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_factory import random_events, source_of

from courier_fast import output
from courier_fast.cli import main
from courier_fast.data.dataset import Dataset
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare
from courier_fast.locations import local_path, location
from courier_fast.output import CLUSTERS, DATASET, EXPORT, INDEX, check_file, check_output

OPTIONS = PrepareOptions(min_history=1)
AGAIN = PrepareOptions(min_history=1, overwrite=True)


def some(out: Path, options: PrepareOptions = OPTIONS, **how: Any) -> None:
    prepare(out, source=source_of(random_events(0)), options=options, **how)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "ds"
    some(out)
    return out


@pytest.fixture
def dataset(prepared: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", prepared, tmp_path / "ds"], check=True)
    return tmp_path / "ds"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is there -------------------------------------------------------------------------------


def test_overwrite_deleted_any_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("years")
    with pytest.raises(
        ValueError, match=r"expected a new folder or a dataset, got .*not empty \(a.txt\)"
    ):
        some(tmp_path / "thesis", AGAIN)
    assert (tmp_path / "thesis" / "a.txt").read_text() == "years"
    assert names(tmp_path) == ["thesis"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 2, "spl', "\xff"])
def test_a_mark_that_does_not_say_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "dataset.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"no dataset\.json that says so"):
        check_output(tmp_path / "x", DATASET, overwrite=True)


@pytest.mark.parametrize(
    "name", ["notes.txt", "images/a.jpg", "pages/00000.arrow.bak", "raw/clicks.csv", "users/link"]
)
def test_a_dataset_that_holds_something_else(dataset: Path, name: str) -> None:
    (dataset / name).parent.mkdir(exist_ok=True)
    if name.endswith("link"):
        (dataset / name).symlink_to(dataset.parent)
    else:
        (dataset / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds something else, too: {name}"):
        check_output(dataset, DATASET, overwrite=True)


def test_litter_of_file_managers_is_nothing(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for folder in (tmp_path / "new", dataset):
        (folder / ".DS_Store").touch()
    check_output(tmp_path / "new", DATASET)
    check_output(dataset, DATASET, overwrite=True)


def test_files_pipes_sockets_and_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tmp_path / "socket"))
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = names(tmp_path)
    for name, text in {
        "file": "which is a file",
        "pipe": "which is a pipe",
        "socket": "which is a socket",
        "to-file": "which is a file",
        "dangling": "a link to .*nowhere, which is not there",
        "loop": "a link to .*loop, which is not there",
    }.items():
        with pytest.raises(ValueError, match=text):
            some(tmp_path / name, AGAIN)
    with pytest.raises(ValueError, match="which is a device"):
        check_output(Path("/dev/null"), DATASET, overwrite=True)
    with pytest.raises(NotADirectoryError, match="file is no folder"):
        some(tmp_path / "file" / "ds", AGAIN)
    with pytest.raises(ValueError, match="in .*dangling, a link to .*nowhere, which is not there"):
        some(tmp_path / "dangling" / "ds", AGAIN)
    assert names(tmp_path) == before


def test_a_link_to_a_folder_stays_one(dataset: Path, tmp_path: Path) -> None:
    """The folder behind it was put aside, and the link too, before an error."""
    (tmp_path / "link").symlink_to("ds")
    some(tmp_path / "link", AGAIN)
    assert (tmp_path / "link").is_symlink()
    assert Dataset(tmp_path / "link").num_pages
    assert names(tmp_path) == ["ds", "link"]


def test_paths_that_are_written_in_other_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    for text in ("a/../b/", "./b", f"{tmp_path}//b/", "a/../a/../b"):
        assert check_output(Path(text), DATASET) == tmp_path / "b"
    assert check_output(Path("new/er/ds"), DATASET) == tmp_path / "new" / "er" / "ds"


# ---- what is read --------------------------------------------------------------------------------


def test_never_an_input_or_what_holds_one(dataset: Path, tmp_path: Path) -> None:
    photos = tmp_path / "shop" / "photos"
    photos.mkdir(parents=True)
    (photos / "a.jpg").write_text("x")
    (tmp_path / "other").symlink_to(photos)
    for out in (
        photos,
        tmp_path / "shop",
        tmp_path / "other",
        tmp_path / "shop" / "x" / ".." / "photos",
    ):
        with pytest.raises(ValueError, match="is not read, got .* which (is|holds) the input"):
            check_output(out, DATASET, inputs=[photos], overwrite=True)
    with pytest.raises(ValueError, match="which holds the input"):
        check_output(dataset, DATASET, inputs=[dataset / "items" / "00000.arrow"], overwrite=True)
    # Beside the images, and even among them, there is room; not among files that are all read.
    check_output(photos / "ds", DATASET, inputs=[photos])
    with pytest.raises(ValueError, match="all of whose files are read"):
        check_output(photos / "ds", DATASET, listed=[photos])
    check_output(tmp_path / "shop" / "ds", DATASET, listed=[photos / "a.jpg", "s3://shop/ds"])


def test_never_the_current_folder_or_the_home(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "me").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    for out, text in {
        tmp_path / "home" / "me": "is the home folder",
        tmp_path / "home": "holds the home folder",
        Path("/"): "holds the current",
    }.items():
        with pytest.raises(ValueError, match=text):
            check_output(out, DATASET, overwrite=True)
    monkeypatch.chdir(dataset / "items")
    for text in (".", "..", str(dataset), "../../ds"):
        with pytest.raises(ValueError, match="the current folder"):
            check_output(Path(text), DATASET, overwrite=True)


# ---- while it runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [OPTIONS, AGAIN])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_comes_while_it_runs_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: PrepareOptions, kind: str
) -> None:
    """It was deleted, without --overwrite too. What was made meanwhile is kept, and named."""
    real = output.sync_all

    def meanwhile(folder: Path) -> None:
        real(folder)
        if kind == "folder":
            (tmp_path / "ds").mkdir()
            (tmp_path / "ds" / "notes.txt").write_text("mine")
        elif kind == "file":
            (tmp_path / "ds").write_text("mine")
        else:
            (tmp_path / "ds").symlink_to(tmp_path)

    monkeypatch.setattr(output, "sync_all", meanwhile)
    with pytest.raises(
        FileExistsError, match=r"has come or changed .* complete, in .*ds\.finished"
    ):
        some(tmp_path / "ds", options)
    assert Dataset(tmp_path / "ds.finished").num_pages
    assert names(tmp_path) == ["ds", "ds.finished"]
    if kind == "folder":
        assert (tmp_path / "ds" / "notes.txt").read_text() == "mine"


def test_what_comes_into_the_dataset_meanwhile(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = output.sync_all
    monkeypatch.setattr(
        output, "sync_all", lambda folder: (real(folder), (dataset / "mine.txt").touch())
    )
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        some(dataset, AGAIN)
    assert (dataset / "mine.txt").exists() and Dataset(dataset).num_pages
    assert Dataset(dataset.parent / "ds.finished").num_pages


def test_a_rename_that_fails_restores_what_was_there(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = Dataset(dataset).fingerprint, os.rename

    def fail(source: Any, target: Any) -> None:
        if ".partial-" in str(source) and any(dataset.parent.glob("ds.old-*")):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        some(dataset, AGAIN)
    monkeypatch.undo()
    assert Dataset(dataset).fingerprint == before
    assert names(dataset.parent) == ["ds", "ds.finished"]
    assert Dataset(dataset.parent / "ds.finished").num_pages


def mounted(folder: Path) -> bool:
    folder.mkdir()
    return (
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode
        == 0
    )


@pytest.fixture
def volume(tmp_path: Path) -> Any:
    """An empty mounted volume, or a folder that is taken for one."""
    real = mounted(tmp_path / "volume")
    with pytest.MonkeyPatch.context() as patch:
        if not real:
            patch.setattr(output, "_is_mount", lambda path: path == tmp_path / "volume")
        yield tmp_path / "volume"
    if real:
        subprocess.run(["umount", "-l", tmp_path / "volume"], check=True)


def test_a_mounted_volume_is_filled_and_replaced_where_it_is(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume / "lost+found").mkdir()
    some(volume)
    first = Dataset(volume).fingerprint
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        some(volume)
    prepare(volume, source=source_of(random_events(1)), options=AGAIN)
    second = Dataset(volume).fingerprint
    assert first != second
    tables = [
        "dataset.json",
        "events",
        "items",
        "lost+found",
        "manifest.json",
        "page_items",
        "pages",
        "report.json",
        "users",
    ]
    assert names(volume) == tables
    # One that fails in the middle of the renames leaves what was there.
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if str(target) == str(volume / "pages") and ".partial-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(
        FileExistsError, match=r"Input/output error.* complete, in .*volume/finished"
    ):
        some(volume, AGAIN)
    assert names(volume) == sorted([*tables, "finished"])
    assert Dataset(volume).fingerprint == second
    assert Dataset(volume / "finished").fingerprint == first


def test_a_volume_half_filled_by_a_killed_run(volume: Path) -> None:
    some(volume)
    left = volume / ".partial-0123"
    left.mkdir()
    for name in (".lock", "manifest.json"):
        (left / name).touch()
    (volume / "dataset.json").unlink()  # which comes last
    some(volume)
    assert Dataset(volume).num_pages
    assert not left.exists()


# ---- leftovers -----------------------------------------------------------------------------------


def test_leftovers_of_a_killed_run_go_and_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (
        "ds.partial-dead",
        "ds.partial-alive",
        "ds.partial-7",
        "ds.old-7",
        "ds2.partial-1",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "ds.partial-dead" / ".lock").touch()
    lock = output._lock(tmp_path / "ds.partial-alive")
    with caplog.at_level("INFO", logger="courier_fast"):
        some(tmp_path / "ds")
    assert lock is not None
    os.close(lock)
    assert names(tmp_path) == [
        "ds",
        "ds.old-7",
        "ds.partial-7",
        "ds.partial-alive",
        "ds2.partial-1",
    ]
    said = [record.getMessage() for record in caplog.records]
    assert any("ds.partial-dead is removed" in text for text in said)
    for name in ("ds.partial-alive", "ds.partial-7", "ds.old-7"):
        assert any(f"{name} is there" in text for text in said)
    assert not any("ds2" in text for text in said)


# ---- the other commands --------------------------------------------------------------------------


@pytest.mark.parametrize("product", [EXPORT, INDEX, CLUSTERS])
def test_folders_of_other_commands(dataset: Path, tmp_path: Path, product: output.Product) -> None:
    """`index` replaced whatever folder was there; `export` whatever had a contract.json."""
    with pytest.raises(ValueError, match=f"expected a new folder or {product.name}"):
        output.write_folder(dataset, product, lambda folder: None)
    assert Dataset(dataset).num_pages
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / product.mark).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="says so"):
        output.write_folder(mine, product, lambda folder: None)
    (mine / product.mark).write_text(json.dumps(dict.fromkeys(product.keys, 1)))
    output.write_folder(mine, product, lambda folder: (folder / product.mark).write_text("{}"))
    assert (mine / product.mark).read_text() == "{}"
    (mine / "a.txt").touch()
    (mine / product.mark).write_text(json.dumps(dict.fromkeys(product.keys, 1)))
    with pytest.raises(ValueError, match=r"something else, too: a\.txt"):
        output.write_folder(mine, product, lambda folder: None)


def test_the_products_know_all_their_own_files(prepared: Path) -> None:
    assert DATASET.marked(prepared)
    assert DATASET.foreign(prepared) is None


def test_a_page_or_table_took_the_place_of_a_folder(tmp_path: Path) -> None:
    """write_atomically removed a folder at its path."""
    from courier_fast.files import write_atomically

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder"):
        write_atomically(tmp_path / "photos", lambda path: path.write_text("x"))
    (tmp_path / "link").symlink_to("real.txt")
    write_atomically(tmp_path / "link", lambda path: path.write_text("x"))
    assert (tmp_path / "real.txt").read_text() == "x" and (tmp_path / "link").is_symlink()
    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "real.txt", _fail)
    assert names(tmp_path) == ["link", "photos", "real.txt"]


def _fail(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError


@pytest.mark.parametrize("name", ["stdout", "null"])
def test_a_device_is_written_to(name: str) -> None:
    """It was replaced by a file."""
    from courier_fast.files import write_atomically

    before = os.stat(f"/dev/{name}").st_ino
    if not Path(f"/dev/{name}").is_file():  # where the output goes to a file, that is written
        write_atomically(Path(f"/dev/{name}"), lambda path: path.write_text("x"))
        assert os.stat(f"/dev/{name}").st_ino == before


def test_files_that_are_written(tmp_path: Path) -> None:
    (tmp_path / "clicks.csv").write_text("user_id,item_id\n")
    (tmp_path / "old.json").write_text('{"a": 1}')
    (tmp_path / "empty.json").touch()
    check_file(tmp_path / "new" / "a.json", "json", begins="{")
    check_file(tmp_path / "old.json", "json", begins="{")
    check_file(tmp_path / "empty.json", "json", begins="{")
    with pytest.raises(ValueError, match="holds something else"):
        check_file(tmp_path / "clicks.csv", "json", begins="{")
    (tmp_path / "link.json").symlink_to("old.json")
    with pytest.raises(ValueError, match="which is an input"):
        check_file(tmp_path / "link.json", "json", inputs=[tmp_path / "old.json"], begins="{")
    with pytest.raises(ValueError, match="which is a folder"):
        check_file(tmp_path, "json")
    with pytest.raises(NotADirectoryError, match="is no folder"):
        check_file(tmp_path / "old.json" / "x.json", "json")


def commands(tmp: Path, out: Path) -> dict[str, list[str]]:
    """Each command that writes, at `out`; what it reads need not be there: the output is looked at
    first."""
    run, ds, emb = str(tmp / "run"), str(tmp / "ds"), str(tmp / "e.npy")
    return {
        "report": ["report", "--dataset", ds, "--run", run, "--out", str(out)],
        "evaluate": ["evaluate", "--dataset", ds, "--run", run, "--json", str(out)],
        "build": ["index", "build", "--embeddings", emb, "--out", str(out)],
        "clusters": ["index", "clusters", "--embeddings", emb, "--out", str(out)],
        "json": ["index", "search", "--index", str(tmp / "i"), "--item", "a", "--json", str(out)],
        "export": ["export", "--run", run, "--licence", "mit", "--out", str(out)],
        "quickstart": ["quickstart", "--short", "--out", str(out)],
    }


@pytest.mark.parametrize("name", commands(Path(), Path()))
def test_every_command_leaves_a_folder_of_photos(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_text("x")
    assert main(commands(tmp_path, photos)[name]) == 2
    said = capsys.readouterr().err
    assert re.search(r"(which is a folder|not empty \(a.jpg\))", said), said
    assert names(photos) == ["a.jpg"]


def test_folders_that_grow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: Path
) -> None:
    """`train` wrote its settings over a config.toml of the user's, and into the dataset."""
    from courier_fast.ctr.command import _is_ctr
    from courier_fast.train.config import Config
    from courier_fast.train.resume import _is_run, check_run

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.toml").write_text("[data]\n# my notes\n")

    def run(out: Path) -> Config:
        return Config.load(None, {"data.dataset": dataset, "run.out": out, "optim.steps": 1})

    with pytest.raises(ValueError, match=r"a config\.toml that would be written over"):
        check_run(run(mine))
    with pytest.raises(ValueError, match="which is the input"):
        check_run(run(dataset))
    with pytest.raises(ValueError, match="which is a file"):
        check_run(run(dataset / "dataset.json"))
    (mine / "metrics.jsonl").write_text("")
    assert _is_run(mine)
    check_run(run(mine))  # a run's: it goes on
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train.log").touch()
    check_run(run(tmp_path / "logs"))  # nothing is written over
    (tmp_path / "logs" / "cells").mkdir()
    assert not _is_ctr(tmp_path / "logs")


def test_embeddings_are_not_written_over_something_else(tmp_path: Path) -> None:
    from courier_fast.embed.write import check_embeddings_out

    np.save(tmp_path / "features.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"no features\.npy\.json beside it"):
        check_embeddings_out(tmp_path / "features.npy")
    (tmp_path / "features.npy.json").write_text("{}")
    check_embeddings_out(tmp_path / "features.npy")
    with pytest.raises(ValueError, match="which is an input"):
        check_embeddings_out(tmp_path / "features.npy", [tmp_path / "features.npy"])
    (tmp_path / "a.npy.partial").mkdir()
    with pytest.raises(ValueError, match="a folder"):
        check_embeddings_out(tmp_path / "a.npy")


# ---- paths as people write them ------------------------------------------------------------------


def test_file_urls_and_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "100%25.csv").touch()
    for text, path in {
        "~/a.csv": tmp_path / "a.csv",
        "~": tmp_path,
        "file:///a%20b/c": Path("/a b/c"),
        "file://localhost/a": Path("/a"),
        "FILE:///a": Path("/a"),
        "file:/a": Path("/a"),
        f"file://{tmp_path}/100%25.csv": tmp_path / "100%25.csv",
        "./~x": Path("~x"),
        "a~b": Path("a~b"),
    }.items():
        assert location(text) == local_path(text) == path, text
    assert location("s3://shop/ds/") == "s3://shop/ds"
    (tmp_path / "~backup").touch()
    assert location("~backup") == Path("~backup")
    for text, why in {
        "file://server/share/a.csv": "the host 'server'",
        "file:a.csv": "a whole path",
        "file://": "a whole path",
        "~nobody-of-this-name/a": "no home of ~nobody-of-this-name",
        "": "empty text",
        "s3://": "a name after s3://",
        "a\0b": "zero byte",
    }.items():
        with pytest.raises(ValueError, match=re.escape(why)):
            location(text)
    with pytest.raises(ValueError, match=r"expected a local path, got s3://shop/run"):
        local_path("s3://shop/run")


def test_a_url_where_a_path_is_taken_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It made a folder called s3: in the current one."""
    for command in commands(tmp_path, Path("OUT")).values():
        with pytest.raises(SystemExit):
            main([word.replace("OUT", "s3://shop/x") for word in command])
        assert "expected a local path, got s3://shop/x" in capsys.readouterr().err
    assert main(["train", "--data.dataset", "ds", "--run.out", "s3://shop/x"]) == 2
    assert "run.out: " in (said := capsys.readouterr().err) and "expected a local path" in said


def test_settings_of_a_file_know_the_home_and_file_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from courier_fast.train.config import Config

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text(
        '[data]\ndataset = "~/ds"\nfeatures = "file:///a%20b.npy"\n[run]\nout = "~/run"\n'
    )
    config = Config.load("~/c.toml")
    assert config.data.dataset == tmp_path / "ds"
    assert config.data.features == Path("/a b.npy")
    assert config.run.out == tmp_path / "run"


def test_prepare_and_dataset_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    some("~/ds")  # type: ignore[arg-type]
    assert Dataset(f"file://{tmp_path}/ds").num_pages == Dataset("~/ds").num_pages

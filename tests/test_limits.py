"""What data of others cannot do: lead out of a folder, take memory by a header's word, or fill it
with one field."""

from __future__ import annotations

import io
import json
import logging
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_embed import Tiny, embed_folder

from courier_fast.data.images import pictures
from courier_fast.data.images.files import LEADS_OUT
from courier_fast.data.prepare import images, plan, rows
from courier_fast.data.prepare.command import print_report
from courier_fast.data.prepare.images import check_image
from courier_fast.data.prepare.layouts import Columns, generic
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    picture = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(picture).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images 0 to 3; links to them and out of the folder; a loop, a pipe, a link without a
    target."""
    folder, elsewhere = tmp_path / "photos", tmp_path / "photos-elsewhere"
    for path in (folder / "a", elsewhere / "more"):
        path.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "a" / "3.jpg").write_bytes(jpeg(3))
    for name in ("secret.jpg", "more/13.jpg", "2.jpg"):
        (elsewhere / name).write_bytes(jpeg(9))
    (folder / "4.jpg").symlink_to("a/3.jpg")
    (folder / "5.jpg").symlink_to(folder / "0.jpg")
    (folder / "a" / "6.jpg").symlink_to("../1.jpg")
    (folder / "7.jpg").symlink_to(elsewhere / "secret.jpg")
    (folder / "a" / "8.jpg").symlink_to("../../photos-elsewhere/secret.jpg")
    (folder / "9.jpg").symlink_to("7.jpg")  # inside, but that one leads out
    (folder / "10.jpg").symlink_to("10.jpg")
    (folder / "11.jpg").symlink_to("nothing.jpg")
    os.mkfifo(folder / "12.jpg")
    (folder / "linked").symlink_to(elsewhere / "more")  # would have 13
    (folder / "a" / "again").symlink_to("..")  # no end
    (folder / "2.jpeg").write_bytes(jpeg(2))
    (folder / "2.jpg").unlink()
    (folder / "2.jpg").symlink_to(elsewhere / "2.jpg")  # in place of it, 2.jpeg
    top = tmp_path / "top"
    top.symlink_to(folder)  # the folder itself may be a link
    return top


def write_clicks(path: Path, items: int = 14) -> Path:
    rows = [f"u{n % 5},{n % items},{1_600_000_000 + 60 * n}" for n in range(20 * items)]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    return path


def test_prepare_follows_no_link_out_of_the_folder(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = generic([write_clicks(tmp_path / "clicks.csv")], None, Columns())
    options = PrepareOptions(min_history=1, repeats="keep")
    report = prepare(tmp_path / "out", source=source, images=photos, options=options)
    images = report["images"]
    assert images["usable"] == 7  # 0 to 6
    assert images["missing"] == ["13"]
    reasons = images["undecodable"]
    assert sorted(reasons, key=int) == ["7", "8", "9", "10", "11", "12"]
    assert [reasons[i] for i in ("7", "8", "9")] == [LEADS_OUT] * 3
    assert reasons["10"].startswith("unreadable: Too many levels")
    assert reasons["11"].startswith("unreadable: No such file")
    assert reasons["12"] == "not a file"
    assert images["folders_not_followed"] == [str(photos / "linked")]
    print_report(report)
    printed = capsys.readouterr().out
    assert f"7: {LEADS_OUT}" in printed
    assert "not followed" in printed.split("linked")[-1]


def test_nothing_but_links_out_of_the_folder(photos: Path, tmp_path: Path) -> None:
    source = generic([write_clicks(tmp_path / "clicks.csv", items=5)], None, Columns())
    links = tmp_path / "links"
    links.mkdir()
    for i in range(5):
        (links / f"{i}.jpg").symlink_to(photos / "0.jpg")
    with pytest.raises(ValueError, match=f"5 one that cannot be used .first: {LEADS_OUT}"):
        prepare(tmp_path / "out", source=source, images=links)
    with pytest.raises(ValueError, match="expected a folder with images, got none"):
        embed_folder(Tiny(), links, tmp_path / "e.npy")


def test_embed_follows_no_link_out_of_the_folder(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "e.parquet"
    with caplog.at_level(logging.WARNING):
        report = embed_folder(Tiny(), photos, out)
    assert report.missing == ["7", "8", "9"]
    assert report.damaged == ["10", "11", "12"]
    names = sorted(str(photos / name) for name in ("7.jpg", "a/8.jpg", "9.jpg", "linked"))
    assert json.loads(out.with_name("e.parquet.json").read_text())["not_followed"] == names
    assert caplog.messages == [f"{name}: {LEADS_OUT}" for name in names]
    read = pq.read_table(out).to_pydict()
    lost = np.isnan(np.array(read["embedding"])).all(1)
    found = [i for i, gone in zip(read["item_id"], lost, strict=True) if not gone]
    assert sorted(found, key=int) == [str(i) for i in range(7)]


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = tmp_path / "0.jpg", tmp_path / "1.jpg"
    small.write_bytes(jpeg(0))
    large.write_bytes(jpeg(1) + bytes(5000))
    monkeypatch.setattr(pictures, "MAX_FILE", large.stat().st_size - 1)
    checked = list(images.check_images([str(small), str(large)]))
    assert checked[0].image == jpeg(0)
    assert "bytes are over" in checked[1].reason and checked[1].image is None
    assert embed_folder(Tiny(), tmp_path, tmp_path / "e.npy").damaged == ["1"]
    with pytest.raises(ValueError, match="bytes are over"):
        pictures.read_image(str(large))


def bombs() -> dict[str, bytes]:
    """Small files whose headers claim the most that their formats can, or just more than is
    taken."""
    sixteen = (struct.pack(">HH", 16, 16), struct.pack(">HH", 65_500, 65_500))
    found = {}
    for kind, how in (("baseline", {}), ("progressive", {"progressive": True})):
        out = io.BytesIO()
        Image.new("RGB", (16, 16)).save(out, "JPEG", **how)
        assert out.getvalue().count(sixteen[0]) == 1
        found[f"{kind}.jpg"] = out.getvalue().replace(*sixteen)
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "PNG")
    png = bytearray(out.getvalue())
    for side in (100_000, 10_001):  # the second: less than Pillow's own limit
        png[16:24] = struct.pack(">II", side, side)
        png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
        found[f"{side}.png"] = bytes(png)
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "WEBP")
    lossy = out.getvalue()
    found["lossy.webp"] = lossy[:26] + struct.pack("<HH", 16_383, 16_383) + lossy[30:]
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "WEBP", lossless=True)
    lossless = bytearray(out.getvalue())
    lossless[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    found["lossless.webp"] = bytes(lossless)
    canvas = struct.pack("<I", 99_999)[:3] + struct.pack("<I", 39_999)[:3]
    chunks = b"VP8X" + struct.pack("<II", 10, 0) + canvas + lossy[12:]
    found["extended.webp"] = b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks
    return found


MEASURED = """
import io, sys
from pathlib import Path
import numpy as np
from PIL import Image
from courier_fast.data.images import pictures
from courier_fast.data.prepare.images import check_image
from courier_fast.data.images.pictures import seen_size
from courier_fast.serve.load import square

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return max(int(line.split()[1]) for line in lines if line.startswith("VmPeak"))

def refused(read, data):
    try:
        read(np.frombuffer(data, np.uint8), np.array([0, 0, 1, 1], np.float32), 32)
    except Exception:
        return True
    return False

good, *files = [Path(name).read_bytes() for name in sys.argv[1:]]
readers = (pictures.read_fast, pictures.read_pillow)
assert check_image(good).image == good and not any(refused(read, good) for read in readers)
before = peak()
for data in files:
    assert check_image(data).image is None
    assert check_image(data, shrink=32).image is None
    seen_size(np.frombuffer(data, np.uint8))
    try:
        square(Image.open(io.BytesIO(data)), 32)
    except Exception:
        pass
    else:
        raise AssertionError("taken")
    assert all(refused(read, data) for read in readers)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells its memory there")
def test_a_bomb_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    files = {"good.jpg": jpeg(0), **bombs()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert len(data) < 5000
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # The smallest claims 100 million pixels and a few.
    assert int(done.stdout) < 64 << 10  # KiB, of addresses and not only of pages in use


@pytest.mark.parametrize("name", bombs())
def test_the_reason_names_the_size(name: str) -> None:
    reason = check_image(bombs()[name]).reason
    assert "pixels" in reason, reason


# ---- tables --------------------------------------------------------------------------------------


def test_rows_with_a_long_id_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write_clicks(tmp_path / "clicks.csv")
    long = "x" * rows.MAX_ID
    with path.open("a") as file:
        file.write(f"{long},0,1600000000\n{long}x,0,1600000000\nu0,{'ö' * 513},1600000000\n")
    source = generic([path], None, Columns())
    options = PrepareOptions(min_history=1, repeats="keep")
    report = prepare(tmp_path / "out", source=source, options=options)
    assert report["events"]["read"] == 283
    assert report["events"]["dropped"]["an id of over 1,024 bytes"] == 2
    assert report["users"] == 6


def test_an_unclosed_quote_is_a_short_error(tmp_path: Path) -> None:
    path = write_clicks(tmp_path / "clicks.csv")
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:9], '"u0,0,1600000000', *rows[9:]]))
    with pytest.raises(ValueError, match="clicks.csv: cannot be read") as error:
        prepare(tmp_path / "out", source=generic([path], None, Columns()))
    assert "u0,0,1600000000" in str(error.value)
    assert len(str(error.value)) < 1000


def test_too_many_ids_are_an_error_and_no_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_CODES", 13)
    source = generic([write_clicks(tmp_path / "clicks.csv")], None, Columns())
    with pytest.raises(ValueError, match="expected at most 13 users and items"):
        prepare(tmp_path / "out", source=source)

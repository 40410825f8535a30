"""What `prepare` makes of image files: usable ones in any format, the others named and left out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_factory import columns_of
from PIL import Image
from prepare_factory import source_of

from courier_fast.data.dataset import TABLES, Dataset
from courier_fast.data.prepare.images import check_image
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures() -> tuple[dict[str, tuple[bytes, tuple[int, int]]], dict[str, tuple[bytes, str]]]:
    """Usable files with their (height, width) as seen, and unusable ones with a part of the
    reason."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (60, 40, 3), np.uint8)).resize((80, 120))
    jpeg = encoded(photo, "JPEG")
    upright, turned = (120, 80), (80, 120)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = {
        "01.jpg": (jpeg, upright),
        "02.JPG": (encoded(photo, "JPEG", progressive=True), upright),
        "03.jpeg": (encoded(photo.convert("L"), "JPEG"), upright),
        "04.jpg": (encoded(photo.convert("CMYK"), "JPEG"), upright),
        "05.jpg": (encoded(photo, "JPEG", exif=exif), turned),
        "06.png": (encoded(photo.convert("RGBA"), "PNG"), upright),
        "07.png": (encoded(photo.quantize(16), "PNG"), upright),
        "08.png": (encoded(Image.fromarray(np.full((5, 7), 40_000, np.uint16)), "PNG"), (5, 7)),
        "09.webp": (encoded(photo, "WEBP"), upright),
        "10.gif": (encoded(photo, "GIF"), upright),
        "11.bmp": (encoded(photo, "BMP"), upright),
        "12.jpg": (encoded(photo, "PNG"), upright),  # the name says otherwise
        "13.jpg": (encoded(photo.resize((1, 1)), "JPEG"), (1, 1)),
    }
    bad = {
        "20.jpg": (b"", "empty"),
        "21.jpg": (jpeg[: len(jpeg) // 2], "Premature end"),
        "22.jpg": (b"<!DOCTYPE html><html>404</html>", "HTML"),
        "23.jpg": (bytes(rng.integers(0, 256, 3000, np.uint8)), "not an image"),
        "24.png": (encoded(photo, "PNG")[:4000], "truncated"),
        "25.jpg": (jpeg[:900] + bytes(400) + jpeg[1300:], "Corrupt JPEG"),
        "26.jpg": (b"\xff\xd8\xff\xe0", ""),
        "27.webp": (encoded(photo, "WEBP")[:300], ""),
        "28.jpg": (encoded(photo, "JPEG", progressive=True)[:-300], "Premature end"),
    }
    return good, bad


def test_items_without_a_usable_image_are_nowhere(tmp_path: Path) -> None:
    good, bad = pictures()
    folder = tmp_path / "images" / "0"
    folder.mkdir(parents=True)
    for name, (data, _) in {**good, **bad}.items():
        (folder / name).write_bytes(data)
    (folder / "01.png").write_bytes(b"a .jpg comes first")
    (folder / "notes.txt").write_text("no image")
    ids = [name.split(".")[0] for name in (*good, *bad)] + ["98", "99"]
    rng = np.random.default_rng(0)
    events = [
        (f"u{n % 9}", ids[n % len(ids)], int(t)) for n, t in enumerate(rng.integers(0, 500, 600))
    ]
    options = PrepareOptions(min_history=1, repeats="keep")
    out = tmp_path / "out"
    report = prepare(out, source=source_of(events), images=tmp_path / "images", options=options)

    data = Dataset(out)
    usable = [name.split(".")[0] for name in good]
    assert data.item_ids.to_pylist() == usable
    assert len(data.images) == len(usable)
    assert data.images.shapes.tolist() == [list(shape) for _, shape in good.values()]
    for row, (name, (file, _)) in enumerate(good.items()):
        if name not in ("10.gif", "11.bmp"):  # written anew, as JPEG
            assert data.images[row].tobytes() == file
        else:
            assert data.images[row].tobytes()[:2] == b"\xff\xd8"
    images = report["images"]
    assert images == json.loads((out / "report.json").read_text())["images"]
    assert images["missing"] == ["98", "99"]
    assert list(images["undecodable"]) == [name.split(".")[0] for name in bad]
    for reason, (_, part) in zip(images["undecodable"].values(), bad.values(), strict=True):
        assert reason and part in reason
    lost = sum(e[1] not in usable for e in events)
    assert report["events"]["dropped"]["item without a usable image"] == lost
    # Gone before pages were made: as if they had never been there.
    rest = source_of([e for e in events if e[1] in usable])
    prepare(tmp_path / "rest", source=rest, options=options)
    other = Dataset(tmp_path / "rest")
    assert not other.has_images
    for table in TABLES:
        columns, found = columns_of(other, table), columns_of(data, table)
        if table == "items":
            assert not np.any([columns.pop(n) for n in ("height", "width")])
            del found["height"], found["width"]
        assert columns.keys() == found.keys()
        for name, column in columns.items():
            assert column.tolist() == found[name].tolist(), (table, name)


def test_every_kept_image_decodes_in_training(tmp_path: Path) -> None:
    from courier_fast.data.images.decode import make_decoder
    from courier_fast.data.images.transforms import eval_windows

    good, _ = pictures()
    checked = [check_image(data) for data, _ in good.values()]
    images = [np.frombuffer(c.image or b"", np.uint8) for c in checked]
    windows = eval_windows(np.array([(c.height, c.width) for c in checked]))
    for kind in ("software", "pillow"):
        decoder = make_decoder(kind, 32, threads=1)
        _, damaged = decoder.decode(images, windows, np.zeros(len(images), bool))
        decoder.close()
        assert not damaged.any()


def test_shrink_scales_the_short_side() -> None:
    good, _ = pictures()
    for name, (data, (height, width)) in good.items():
        checked = check_image(data, shrink=40)
        if min(height, width) <= 40:
            assert checked.image == data
            continue
        assert (checked.height, checked.width) == (height // 2, width // 2), name
        with Image.open(io.BytesIO(checked.image or b"")) as image:
            assert image.format == "JPEG"
            assert image.size == (checked.width, checked.height)
    _, bad = pictures()
    for name, (data, part) in bad.items():
        reason = check_image(data, shrink=40).reason
        assert reason and part in reason, name


def test_images_of_another_catalogue_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    events = [("u", f"{i}", i) for i in range(25)]
    with pytest.raises(ValueError, match=r"called after items such as .*25 have none"):
        prepare(tmp_path / "out", source=source_of(events), images=tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="images: expected a folder"):
        prepare(tmp_path / "out", source=source_of(events), images=tmp_path / "none")
    assert [p.name for p in tmp_path.iterdir()] == ["images"]

"""Which file is an item's image, what is said where there is none, and pixels that are no bytes."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prepare_factory import source_of

from courier_fast.data.images.files import ImageFiles, index_images
from courier_fast.data.images.pictures import read_pillow
from courier_fast.data.prepare.images import check_image, check_images
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare
from courier_fast.embed.sources import FolderImages

IDS = [f"{i:06}" for i in range(100, 110)]
WHOLE = np.array([0, 0, 1, 1], np.float32)


def put(folder: Path, name: str, size: tuple[int, int] = (8, 6)) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 40)).save(path, "JPEG")
    return path


def found(folder: Path, ids: list[str] = IDS, **how: str) -> ImageFiles:
    return index_images(folder, set(ids), **how)


@pytest.mark.parametrize(
    "hidden",
    [
        ".picasaoriginals/{}.jpg",
        "._{}.jpg",
        ".thumbnails/a/{}.jpg",
        "__MACOSX/{}.jpg",
        "@eaDir/{}.jpg/{}.jpg",
        "lost+found/{}.jpg",
        "$RECYCLE.BIN/{}.jpg",
        "#recycle/{}.jpg",
        "a/.Trash-1000/files/{}.jpg",
        "RECYCLER/{}.jpg",
        "~snapshot/a/{}.jpg",
        "@Recently-Snapshot/{}.jpg",
    ],
)
def test_the_picture_of_a_hidden_folder_was_taken(tmp_path: Path, hidden: str) -> None:
    put(tmp_path, hidden.format("000100", "000100"))
    assert not found(tmp_path).paths
    right = put(tmp_path, "z/000100.png")  # which .jpg would come before
    files = found(tmp_path)
    assert files.paths == {"000100": str(right)} and files.hidden == 1


def test_of_several_files_the_choice_is_by_suffix_folders_size_and_name(tmp_path: Path) -> None:
    names = [
        "a_thumbs/1.jpg",
        "large/1.jpg",
        "1.png",
        "1.JPG",
        "1.jpg",
        "a/2.webp",
        "b/2.tif",
        "3.bmp",
    ]
    sizes = {"large/1.jpg": (80, 60), "1.JPG": (40, 30)}
    for name in names:
        put(tmp_path, name, sizes.get(name, (8, 6)))
    files = found(tmp_path, ["1", "2", "3"])
    order = {
        "1": ["1.JPG", "1.jpg", "large/1.jpg", "a_thumbs/1.jpg", "1.png"],
        "2": ["a/2.webp", "b/2.tif"],
    }
    assert files.several == {i: tuple(str(tmp_path / n) for n in of) for i, of in order.items()}
    assert files.paths["3"] == str(tmp_path / "3.bmp")


def test_a_broken_file_gives_way_to_the_next(tmp_path: Path) -> None:
    good = put(tmp_path, "1.png")
    html, empty = tmp_path / "1.jpg", tmp_path / "1.jpeg"
    html.write_text("<html>404")
    empty.touch()
    (one, none) = check_images([(str(html), str(empty), str(good)), (str(html), str(empty))])
    assert one.image == good.read_bytes() and one.width == 8
    assert "1.jpg: text" in one.reason and "1.jpeg: empty" in one.reason
    assert none.image is None and "1.jpg: text" in none.reason and "1.jpeg: empty" in none.reason


def test_what_a_run_is_writing_was_said_to_lie_in_the_folder(tmp_path: Path) -> None:
    put(tmp_path, "out.partial-0123abcd/images/1.png")
    files = found(tmp_path, ["1"])
    assert (files.paths, files.hidden) == ({}, 1)


def prepared(tmp_path: Path, photos: Path, ids: list[str] = IDS, **how: Any) -> dict[str, Any]:
    source = source_of([(f"u{n % 3}", ids[n % len(ids)], 60 * n) for n in range(90)])
    options = PrepareOptions(min_history=1, repeats="keep", page_size=3)
    return prepare(tmp_path / "out", source=source, images=photos, options=options, **how)


def test_several_files_and_folders_that_cannot_be_read_are_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    photos = tmp_path / "photos"
    for i in IDS:
        put(photos, f"{i}.png")
    (photos / f"{IDS[3]}.jpg").write_text("<html>")
    put(photos, f"a/{IDS[4]}.jpg")
    put(photos, f"closed/{IDS[5]}.jpg")
    put(photos, "loop/x.txt")
    (photos / "loop" / "again").symlink_to(photos)
    scan = os.scandir

    @contextmanager
    def refused(path: Any) -> Iterator[Any]:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        with scan(path) as entries:
            yield entries

    monkeypatch.setattr(os, "scandir", refused)
    images = prepared(tmp_path, photos)["images"]
    assert images["usable"] == len(IDS)
    assert images["several_files"]["items"] == 2
    assert images["several_files"]["first"][IDS[4]] == [
        str(photos / "a" / f"{IDS[4]}.jpg"),
        str(photos / f"{IDS[4]}.png"),
    ]
    assert list(images["gave_way"]) == [IDS[3]]
    assert images["folders_unreadable"] == [f"{photos / 'closed'}: Permission denied"]
    text = "\n".join(caplog.messages)
    assert "2 items have several files" in text and "1 folders cannot be read" in text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["{}.heic"], "10 items have a file with the suffix .heic, which is not read"),
        (["{}.JP2", "{}.svg"], "which is not read"),
        (["{}"], "a file with no suffix"),
        (["{short}.jpg"], "differ in leading zeros (item 000100, file 100.jpg)"),
        (["00{}.jpg"], "differ in leading zeros (item 000100, file 00000100.jpg)"),
        (
            ["{}_1.jpg", "{}_2.jpg"],
            "names have more in them than the item (000100_1.jpg for 000100)",
        ),
        (["{}-front.jpg"], "(000100-front.jpg for 000100)"),
        (["img_{}.jpg"], "(img_000100.jpg for 000100)"),
        (["IMG {} (2).jpg"], "for 000100)"),
        (["{}/main.jpg"], "folders are called after items (000100/main.jpg)"),
        (["sku/{}/a/1.jpg"], "folders are called after items"),
        (["{}.jpg.jpg"], "000100.jpg.jpg"),
        (["photos.zip"], "photos.zip is an archive: unpack it"),
        (["photos.tar.gz"], "photos.tar.gz is an archive"),
        (["other{short}x.jpg"], "there are 10 .jpg (other100x.jpg"),
        ([".{}.jpg"], "10 that are hidden"),
        ([], "of files there are none"),
    ],
)
def test_what_lies_in_the_folder_is_said(tmp_path: Path, names: list[str], said: str) -> None:
    for i in IDS:
        for name in names:
            (tmp_path / name.format(i, short=i.lstrip("0"))).parent.mkdir(
                parents=True, exist_ok=True
            )
            (tmp_path / name.format(i, short=i.lstrip("0"))).touch()
    files = found(tmp_path)
    assert not files.paths
    assert said in files.missing_note(IDS)


@pytest.mark.parametrize(
    ("item", "name", "said"),
    [
        ("Sku-A", "sku-a.jpg", "in upper and lower case"),
        ("a b", "a%20b.jpg", "in URL-encoded characters"),
        ("12/7", "12_7.jpg", "in characters that are no letters and digits"),
        ("12.0", "12.jpg", "in a decimal point"),
        ("a.jpg", "a.jpg", "in a suffix"),
    ],
)
def test_how_names_differ_from_ids_is_said(tmp_path: Path, item: str, name: str, said: str) -> None:
    put(tmp_path, name)
    assert said in found(tmp_path, [item]).missing_note([item])


def test_a_name_in_another_form_of_unicode_is_the_same(tmp_path: Path) -> None:
    put(tmp_path, "cafe\u0301.jpg")
    assert list(found(tmp_path, ["caf\u00e9"]).paths) == ["caf\u00e9"]


def test_no_image_and_few_images_are_told_apart_and_both_say_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = tmp_path / "photos"
    for n, i in enumerate(IDS):
        put(photos, f"{i}.{'jpg' if n < 4 else 'heic'}")
    report = prepared(tmp_path, photos)
    note = f"6 of 10 items have none under {photos}"
    assert any(
        note in n and "6 items have a file with the suffix .heic" in n for n in report["notes"]
    )
    assert any(note in text for text in caplog.messages)
    for i in IDS[:4]:
        (photos / f"{i}.jpg").unlink()
    with pytest.raises(ValueError, match="of 10 items, 10 have none.*6 .heic.*which is not read"):
        prepared(tmp_path / "b", photos)


# ---- embed ---------------------------------------------------------------------------------------


def test_a_folder_for_each_item_became_one_embedding_for_each_name(tmp_path: Path) -> None:
    for i in IDS:
        for name in ("front", "back"):
            put(tmp_path, f"sku/{i}/{name}.jpg")
    decoder: Any = None
    with pytest.raises(ValueError, match=r"10 called (front|back) .*--id-from folder"):
        FolderImages(tmp_path / "sku", decoder)
    by_folder = FolderImages(tmp_path / "sku", decoder, "folder")
    assert by_folder.ids == IDS
    assert by_folder.paths[0] == tuple(
        str(tmp_path / f"sku/{IDS[0]}/{n}.jpg") for n in ("back", "front")
    )
    by_path = FolderImages(tmp_path / "sku", decoder, "path")
    assert len(by_path.ids) == 20 and by_path.ids[:2] == ["000100/back", "000100/front"]


def test_embed_takes_the_next_file_where_one_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from courier_fast.data.images.decode import make_decoder

    put(tmp_path, "a.png")
    put(tmp_path, "b.jpg")
    (tmp_path / "a.jpg").write_text("<html>")
    decoder = make_decoder("pillow", 4, threads=1)
    with caplog.at_level(logging.WARNING):
        source = FolderImages(tmp_path, decoder)
    assert "1 ids have several files" in caplog.text
    images, damaged = source.load(np.array([0, 1]))
    assert not damaged.any() and (images[0] == images[1]).all()
    decoder.close()


# ---- pixels --------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "TIFF") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def seen(data: bytes) -> list[int]:
    """Least and largest byte of what training sees."""
    checked = check_image(data)
    assert checked.image is not None, checked.reason
    picture = read_pillow(np.frombuffer(checked.image, np.uint8), WHOLE, 4)
    direct = read_pillow(np.frombuffer(data, np.uint8), WHOLE, 4)  # as `embed --images` does
    assert np.abs(picture.astype(int) - direct).max() <= 2  # JPEG
    return [int(direct.min()), int(direct.max())]


@pytest.mark.parametrize(
    ("image", "kind", "grey"),
    [
        (Image.fromarray(np.full((8, 8), 0.9, np.float32)), "TIFF", 230),
        (Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF", 0),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), "TIFF", 255),
        (Image.fromarray(np.full((8, 8), 257 * 90 + 3, np.uint16)), "PNG", 90),
        (Image.fromarray(np.full((8, 8), 257 * 90, ">u2")), "TIFF", 90),
        (Image.fromarray(np.full((8, 8), 257 * 90, np.int32)), "TIFF", 90),
        (Image.new("1", (8, 8), 1), "PNG", 255),
        (Image.new("L", (8, 8), 77), "PNG", 77),
        (Image.new("LA", (8, 8), (10, 0)), "PNG", 255),
        (Image.new("RGBA", (8, 8), (10, 10, 10, 0)), "PNG", 255),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 155)), "TIFF", 100),
        (Image.new("YCbCr", (8, 8), (90, 128, 128)), "TIFF", 90),
    ],
)
def test_pixels_of_any_kind_are_seen_as_they_are(image: Image.Image, kind: str, grey: int) -> None:
    assert seen(encoded(image, kind)) == [grey, grey]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((8, 8), 200, np.float32), "floats from 200 to 200, expected 0 to 1"),
        (np.full((8, 8), -0.5, np.float32), "floats from -0.5"),
        (np.full((8, 8), np.nan, np.float32), "floats from nan"),
        (np.full((8, 8), np.inf, np.float32), "floats from inf"),
        (np.full((8, 8), 200, np.int32), "32-bit integers from 200 to 200, expected 8 or 16 bits"),
        (np.full((8, 8), 2**30, np.int32), "32-bit integers"),
        (np.full((8, 8), -1, np.int32), "32-bit integers"),
        (np.full((8, 8), 200, np.uint16), "16-bit grey up to 200, where white is 65535"),
        (np.full((8, 8), 0.002, np.float32), "floats up to 0.002, where white is 1"),
    ],
)
def test_pixels_whose_range_nobody_says_were_black(values: np.ndarray, said: str) -> None:
    checked = check_image(encoded(Image.fromarray(values)))
    assert checked.image is None and said in checked.reason


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which is not read"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "a TIFF of a kind that is not read"),
        (b"PK\3\4 and so on", "not an image"),
    ],
)
def test_what_is_called_jpg_and_is_something_else_is_said(data: bytes, said: str) -> None:
    assert check_image(data).reason.startswith(said)


def test_a_black_picture_of_16_bits_is_one() -> None:
    assert check_image(encoded(Image.fromarray(np.zeros((8, 8), np.uint16)))).height == 8

"""Decoders: the same picture from each, every kind of file, every kind of damage."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from courier_fast.data.images import pictures as pictures_module
from courier_fast.data.images.decode import Decoder, make_decoder
from courier_fast.data.images.pictures import (
    exif_orientation,
    jpeg_header,
    pixel_slices,
    stored_window,
    turn,
)
from courier_fast.data.images.software import Recycler, normalise_batch
from courier_fast.data.images.transforms import eval_windows, random_flips, random_windows

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE = 48
PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "jpeg-decode"
DALI = pytest.param("dali-cpu", marks=pytest.mark.long("DALI"))
NO_DALI = "DALI is not installed: the extra test-all brings it"


@pytest.fixture(scope="module", params=["software", "pillow", DALI])
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    if request.param == "dali-cpu":
        pytest.importorskip("nvidia.dali", reason=NO_DALI)
    decoder = make_decoder(request.param, SIZE, threads=2, mean=MEAN, std=STD)
    yield decoder
    decoder.close()


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Waves of many lengths, fine grain and edges; no symmetry."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 127.0)
    for k in range(1, 6):
        a, b, c = rng.normal(size=(3, 3)) * 2**k
        pixels += 60 / k * np.sin(a * x[..., None] + b * y[..., None] + c)
    pixels += rng.normal(size=(height, width, 1)) * 12
    pixels[height // 3 :, : width // 2] *= 0.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> np.ndarray:
    file = io.BytesIO()
    image.save(
        file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}) | options
    )
    return np.frombuffer(file.getvalue(), np.uint8)


def pixels_of(pictures: torch.Tensor) -> np.ndarray:
    """[n, H, W, 3] in 0 to 255."""
    return (
        (pictures.permute(0, 2, 3, 1).float() * torch.tensor(STD) + torch.tensor(MEAN)) * 255
    ).numpy()


def whole(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1)), np.zeros(n, bool)


def resized(
    image: Image.Image,
    window: np.ndarray,
    flip: bool = False,
    kernel: Image.Resampling = Image.Resampling.BILINEAR,
    shift: tuple[float, float] = (0, 0),
) -> np.ndarray:
    """Pillow's antialiased resize of the window in whole pixels, moved by `shift` pixels of the
    result."""
    rows, columns = pixel_slices(window, image.height, image.width)
    box = np.array([columns.start, rows.start, columns.stop, rows.stop], float)
    size = (box[2:] - box[:2]) / SIZE
    box = (box + np.tile(shift * size, 2)).clip(0, np.tile(image.size, 2))
    picture = np.asarray(image.resize((SIZE, SIZE), kernel, tuple(box)), np.float32)
    return picture[:, ::-1] if flip else picture


def check_picture(
    found: np.ndarray, image: Image.Image, window: np.ndarray, flip: bool = False, slack: float = 2
) -> None:
    """`found` is as near to the bilinear picture as interpolation leaves open.

    What a picture in fewer pixels should be is a matter of the filter: box and Lanczos are the
    softest and the sharpest in use, and their distance from the bilinear picture is what filters
    differ by. Windows are cut in whole pixels of a decoded picture that is at least as large as the
    result: so an edge may lie half a pixel off, and the same picture moved by that is what a cut
    may differ by. `slack` levels are for what is before: inverse DCT, colours, rounding.
    """
    expected = resized(image, window, flip)

    def distance(other: np.ndarray) -> float:
        return float(np.abs(other - expected).mean())

    filters = max(
        distance(resized(image, window, flip, k))
        for k in (Image.Resampling.BOX, Image.Resampling.LANCZOS)
    )
    cut = max(
        distance(resized(image, window, flip, shift=shift))
        for shift in ((0.5, 0.5), (0.5, -0.5), (-0.5, 0.5), (-0.5, -0.5))
    )
    assert distance(found) <= filters + cut + slack
    if min(image.size) >= SIZE:
        assert distance(found) < 0.5 * distance(found[:, ::-1]), "not told from its mirror image"


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (7, 300), (37, 53), (SIZE, SIZE), (60, 90), (500, 500), (900, 1200), (1201, 403)],
)
def test_windows_and_flips_give_the_picture(
    decoder: Decoder, height: int, width: int, subsampling: int
) -> None:
    image = scene(height, width)
    file = encoded(image, subsampling=subsampling)
    seen = Image.open(io.BytesIO(file)).convert("RGB")
    shapes = np.tile([[height, width]], (12, 1))
    rng = np.random.default_rng(1)
    windows = np.concatenate(
        [
            random_windows(rng, shapes[:6]),
            random_windows(rng, shapes[:4], (0.02, 0.2)),
            eval_windows(shapes[:2]),
        ]
    )
    flips = random_flips(rng, 12)
    pictures, damaged = decoder.decode([file] * 12, windows, flips)
    assert pictures.shape == (12, 3, SIZE, SIZE)
    assert pictures.dtype == torch.float32
    assert pictures.is_contiguous(memory_format=torch.channels_last)
    assert not damaged.any()
    for picture, window, flip in zip(pixels_of(pictures), windows, flips, strict=True):
        check_picture(picture, seen, window, flip, slack=2 if subsampling == 0 else 4)


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (12, 130, 250)]


@pytest.mark.parametrize("subsampling", [0, 2])
def test_colours_are_in_order_and_scale(decoder: Decoder, subsampling: int) -> None:
    files = [encoded(Image.new("RGB", (90, 70), c), subsampling=subsampling) for c in COLOURS]
    pictures, _ = decoder.decode(files, *whole(len(files)))
    # Colour conversion rounds to whole levels, twice.
    assert np.abs(pixels_of(pictures) - np.array(COLOURS)[:, None, None]).max() <= 3


def test_red_is_left_and_a_flip_moves_it(decoder: Decoder) -> None:
    halves = Image.new("RGB", (200, 200), (0, 0, 255))
    halves.paste((255, 0, 0), (0, 0, 100, 200))
    files = [encoded(halves), encoded(halves), encoded(halves, "PNG"), encoded(halves, "PNG")]
    flips = np.array([False, True, False, True])
    pictures = pixels_of(decoder.decode(files, whole(4)[0], flips)[0])
    red_left = pictures[:, :, : SIZE // 2 - 1, 0].mean((1, 2)) > 250
    assert red_left.tolist() == [True, False, True, False]
    assert np.array_equal(pictures[1::2, :, ::-1], pictures[::2])


SEEN_TO_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def exif_rotated(seen: Image.Image, orientation: int, **options: object) -> np.ndarray:
    """A file that shows `seen` by its orientation tag."""
    exif = Image.Exif()
    exif[0x010F] = "a maker"  # another tag before it
    exif[0x0112] = orientation
    stored = seen if orientation == 1 else seen.transpose(SEEN_TO_STORED[orientation])
    return encoded(stored, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_exif_rotation_with_windows_and_flips(
    decoder: Decoder, orientation: int, kind: str
) -> None:
    seen = scene(160, 240)
    file = exif_rotated(seen, orientation, kind=kind, quality=95)
    if kind == "JPEG":
        assert exif_orientation(file) == orientation
    windows = np.array(
        [[0, 0, 1, 1], [0, 0.1, 0.5, 0.4], [0.4, 0.5, 0.6, 0.45], [0.1, 0.6, 0.85, 0.4]], np.float32
    ).repeat(2, 0)
    flips = np.tile([False, True], 4)
    pictures, damaged = decoder.decode([file] * 8, windows, flips)
    assert not damaged.any()
    for picture, window, flip in zip(pixels_of(pictures), windows, flips, strict=True):
        check_picture(picture, seen, window, flip, slack=2 if kind == "JPEG" else 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_undoes_what_pillow_does(orientation: int) -> None:
    seen = scene(40, 60)
    stored = seen if orientation == 1 else seen.transpose(SEEN_TO_STORED[orientation])
    assert np.array_equal(turn(torch.from_numpy(np.array(stored)), orientation), np.asarray(seen))
    window = np.array([0.1, 0.2, 0.5, 0.3], np.float32)
    rows, columns = pixel_slices(stored_window(window, orientation), stored.height, stored.width)
    cut = turn(torch.from_numpy(np.array(stored)[rows, columns]), orientation)
    assert np.array_equal(cut, np.asarray(seen)[4:24, 12:30])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger than file")
def test_damaged_exif_blocks_say_nothing(decoder: Decoder) -> None:
    image = scene(60, 60)
    good = bytes(exif_rotated(image, 6))
    start = good.index(b"Exif")
    for where, what in ((4, b"\xff\xff\xff\xff"), (8, b"\xff\xff"), (14, b"\x99\x99"), (0, b"??")):
        block = bytearray(good)
        block[start + 6 + where : start + 6 + where + len(what)] = what
        file = np.frombuffer(bytes(block), np.uint8)
        assert exif_orientation(file) in range(1, 9)
        assert not decoder.decode([file], *whole(1))[1].any()


@cache
def kinds() -> dict[str, tuple[np.ndarray, Image.Image]]:
    """A file of each kind, and what is to be seen."""
    image = scene(200, 160)
    grey = image.convert("L")
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 160, dtype=np.uint8), (200, 1))))
    over_white = Image.alpha_composite(Image.new("RGBA", alpha.size, "white"), alpha).convert("RGB")
    grey_over_white = Image.alpha_composite(
        Image.new("RGBA", alpha.size, "white"), alpha.convert("LA").convert("RGBA")
    )
    palette = image.quantize(64)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    cmyk = image.convert("CMYK")
    black = Image.fromarray(np.full((200, 160), 60, np.uint8))
    cmyk = Image.merge("CMYK", (*cmyk.split()[:3], black))
    two = image.transpose(Image.Transpose.ROTATE_180).quantize(64)
    return {
        "grey": (encoded(grey), grey.convert("RGB")),
        "progressive": (encoded(image, progressive=True), image),
        "4:4:4": (encoded(image), image),
        "4:2:2": (encoded(image, subsampling=1), image),
        "4:2:0": (encoded(image, subsampling=2), image),
        "RGB": (encoded(image, keep_rgb=True), image),
        "CMYK": (encoded(cmyk), cmyk.convert("RGB")),
        "trailing bytes": (np.concatenate([encoded(image), np.zeros(200, np.uint8)]), image),
        "PNG": (encoded(image, "PNG"), image),
        "PNG with alpha": (encoded(alpha, "PNG"), over_white),
        "PNG palette": (encoded(palette, "PNG"), palette.convert("RGB")),
        "PNG 16 bit": (encoded(deep, "PNG"), grey.convert("RGB")),
        "PNG 1 bit": (encoded(grey.convert("1"), "PNG"), grey.convert("1").convert("RGB")),
        "PNG grey and alpha": (encoded(alpha.convert("LA"), "PNG"), grey_over_white.convert("RGB")),
        "WebP": (encoded(image, "WEBP", quality=95), image),
        "WebP with alpha": (encoded(alpha, "WEBP", lossless=True), over_white),
        "BMP": (encoded(image, "BMP"), image),
        "TIFF": (encoded(image, "TIFF"), image),
        "GIF": (encoded(palette, "GIF"), palette.convert("RGB")),
        "GIF of two frames": (
            encoded(palette, "GIF", save_all=True, append_images=[two]),
            palette.convert("RGB"),
        ),
    }


@pytest.mark.parametrize("kind", list(kinds()))
def test_every_kind_of_file(decoder: Decoder, kind: str) -> None:
    file, seen = kinds()[kind]
    windows = np.array([[0, 0, 1, 1], [0.1, 0.3, 0.7, 0.6]], np.float32)
    flips = np.array([False, True])
    pictures, damaged = decoder.decode([file, file], windows, flips)
    assert not damaged.any()
    for picture, window, flip in zip(pixels_of(pictures), windows, flips, strict=True):
        # WebP and subsampled JPEG keep colour at half the resolution.
        check_picture(picture, seen, window, flip, slack=4)


@cache
def damage() -> dict[str, np.ndarray]:
    image = scene(200, 160)
    good = encoded(image)
    header = jpeg_header(good)
    assert header is not None
    start = len(good) - 2 - header.body
    end = np.frombuffer(b"\xff\xd9", np.uint8)
    exif = exif_rotated(image, 6)
    bomb = bytearray(encoded(image.convert("1"), "PNG"))
    bomb[16:24] = (20_000).to_bytes(
        4, "big"
    ) * 2  # its header's width and height, and their check sum
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    return {
        "missing": good[:0],
        "one byte": good[:1],
        "header cut": good[:150],
        "header alone": good[:start],
        "header and end": np.concatenate([good[:start], end]),
        "half": good[: len(good) // 2],
        "half of a turned one": exif[: len(exif) // 2],
        "half of a progressive one": (p := encoded(image, progressive=True))[: len(p) // 2],
        "cut before the end": good[:-400],
        "no pixels": np.concatenate([good[:163], np.zeros(4, np.uint8), good[167:]]),
        "garbage": np.random.default_rng(0).integers(0, 256, 5000, np.uint8),
        "garbage in a frame": np.concatenate(
            [good[:2], np.random.default_rng(1).integers(0, 256, 5000, np.uint8), end]
        ),
        "garbage tables": np.concatenate([good[:30], np.full(100, 7, np.uint8), good[130:]]),
        "a web page": np.frombuffer(b"<!DOCTYPE html><html><body>404</body></html>" * 9, np.uint8),
        "zeros": np.zeros(4000, np.uint8),
        "half a PNG": encoded(image, "PNG")[:3000],
        "half a WebP": encoded(image, "WEBP")[:900],
        "a bomb": np.frombuffer(bomb, np.uint8),
        "a JPEG bomb": np.concatenate([good[:163], np.full(4, 0xEE, np.uint8), good[167:]]),
    }


@pytest.mark.parametrize("what", list(damage()))
def test_a_damaged_image_is_neutral_and_its_neighbours_are_untouched(
    decoder: Decoder, what: str
) -> None:
    good = [encoded(scene(90, 120, seed)) for seed in range(5)]
    rng = np.random.default_rng(3)
    windows, flips = random_windows(rng, np.full((6, 2), (90, 120))), random_flips(rng, 6)
    images = [*good[:2], damage()[what], *good[2:]]
    pictures, damaged = decoder.decode(images, windows, flips)
    assert damaged.tolist() == [False, False, True, False, False, False]
    assert (pictures[2] == 0).all()
    kept = [0, 1, 3, 4, 5]
    for _ in range(2):  # and the decoder is as good as new
        alone, none = decoder.decode(good, windows[kept], flips[kept])
        assert not none.any()
        assert torch.equal(pictures[kept], alone)


def test_many_damaged_images(decoder: Decoder) -> None:
    kinds = list(damage().values())
    good = [encoded(scene(90, 120, seed)) for seed in range(len(kinds))]
    images = [x for pair in zip(good, kinds, strict=True) for x in pair]
    pictures, damaged = decoder.decode(images, *whole(len(images)))
    assert damaged.tolist() == [False, True] * len(kinds)
    assert torch.equal(pictures[::2], decoder.decode(good, *whole(len(good)))[0])
    pictures, damaged = decoder.decode(kinds, *whole(len(kinds)))
    assert damaged.all()
    assert (pictures == 0).all()


def test_data_missing_within_a_scan_are_seen_by_the_strict_decoder() -> None:
    """Pillow and DALI take libjpeg's grey filling for the picture; `prepare` reads strictly,
    once."""
    good = encoded(scene(200, 160))
    files = [
        np.concatenate([good[: len(good) // 2], good[-2:]]),
        np.concatenate(
            [good[: len(good) // 2], np.arange(300, dtype=np.uint8), good[len(good) // 2 + 300 :]]
        ),
    ]
    assert make_decoder("software", SIZE).decode(files, *whole(2))[1].all()


def test_no_images(decoder: Decoder) -> None:
    pictures, damaged = decoder.decode([], *whole(0))
    assert pictures.shape == (0, 3, SIZE, SIZE)
    assert damaged.shape == (0,)


def test_batches_of_any_size_in_turn(decoder: Decoder) -> None:
    files = [encoded(scene(90, 120, seed)) for seed in range(40)]
    windows, flips = whole(40)
    everything, _ = decoder.decode(files, windows, flips)
    before = everything.clone()
    for n in (1, 40, 7, 39):
        assert torch.equal(decoder.decode(files[:n], windows[:n], flips[:n])[0], before[:n])
    assert torch.equal(everything, before), "a later batch wrote into an earlier one"


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    memory = Recycler()
    first = torch.from_numpy(memory.take((4, 5), np.float32)).fill_(1)
    view = first[1:].permute(1, 0)
    where = first.data_ptr()
    del first
    second = memory.take((4, 5), np.float32)
    second[:] = 2
    assert (view == 1).all()
    del view
    gc.collect()
    assert memory.take((2, 2), np.float16).ctypes.data == where
    assert memory.take((900, 5), np.float32).shape == (900, 5)


@pytest.mark.parametrize("kind", ["software", "pillow"])
def test_threads_change_nothing(kind: str) -> None:
    files = [encoded(scene(90 + s, 120, s)) for s in range(20)]
    results = [make_decoder(kind, SIZE, threads=t).decode(files, *whole(20))[0] for t in (1, 2, 5)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", ["software", "pillow", DALI])
def test_half_precision(kind: str) -> None:
    if kind == "dali-cpu":
        pytest.importorskip("nvidia.dali", reason=NO_DALI)
    files = [encoded(scene(90, 120)), encoded(scene(90, 120), "PNG"), damage()["half"]]
    full, half = (
        make_decoder(kind, SIZE, dtype=d).decode(files, *whole(3))[0]
        for d in (torch.float32, torch.float16)
    )
    assert half.dtype == torch.float16
    assert (full - half.float()).abs().max() <= full.abs().max() * 2**-10  # one rounding
    if kind == "dali-cpu":
        with pytest.raises(ValueError, match="dtype: expected float16 or float32 from DALI, got"):
            make_decoder(kind, SIZE, dtype=torch.bfloat16)
    else:
        both = make_decoder(kind, SIZE, dtype=torch.bfloat16).decode(files, *whole(3))[0]
        assert torch.equal(both, full.bfloat16())


def test_normalising_on_the_device_is_the_same() -> None:
    rng = np.random.default_rng(0)
    raw = torch.from_numpy(rng.integers(0, 256, (3, 4, 5, 3), np.uint8))
    scale, shift = torch.rand(3), torch.rand(3)
    out = normalise_batch(raw, torch.tensor([False, True, False]), scale, shift)
    assert (out[1] == 0).all()
    assert torch.allclose(out[0], raw[0].float() * scale + shift)


@pytest.mark.long("DALI")
@pytest.mark.parametrize("name", ["half", "garbage", "trailing bytes"])
def test_dali_finds_the_image_that_it_cannot_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the look at the headers lets pass costs its own picture, whatever DALI says, and no
    other."""
    dali = pytest.importorskip("courier_fast.data.images.dali", reason=NO_DALI)
    decoder = make_decoder("dali-cpu", SIZE, threads=1)
    good = [encoded(scene(90, 120, seed)) for seed in range(7)]
    alone, _ = decoder.decode(good, *whole(7))
    monkeypatch.setattr(dali, "orientation_for_dali", lambda image: 1)
    bad = kinds()[name][0] if name in kinds() else damage()[name]
    pictures, damaged = decoder.decode([*good[:3], bad, *good[3:]], *whole(8))
    assert torch.equal(pictures[[0, 1, 2, 4, 5, 6, 7]], alone)
    assert damaged.tolist() == [False] * 3 + [name != "trailing bytes"] + [False] * 4
    decoder.close()


def test_pillow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_module, "simplejpeg", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'simplejpeg: pip install "courier_fast\[train\]"'
    ):
        make_decoder("software")
    decoder = make_decoder("auto", SIZE)
    assert not decoder.decode([encoded(scene(90, 120))], *whole(1))[1].any()


@pytest.mark.parametrize("name", ["CMYK", "EXIF 6", "grey", "RGB"])
def test_resizing_without_torch_gives_the_same_picture(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = scene(150, 211)
    options: dict[str, object] = {}
    if name == "EXIF 6":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif.tobytes()
    file = encoded(image.convert({"CMYK": "CMYK", "grey": "L"}.get(name, "RGB")), **options)
    window = whole(1)[0][0]
    with_torch = [pictures_module.read_fast(file, window, size) for size in (SIZE, 300)]
    monkeypatch.setattr(pictures_module, "torch", None)
    for size, expected in zip((SIZE, 300), with_torch, strict=True):
        # Both libraries round weights to integers, not quite alike.
        found = pictures_module.read_fast(file, window, size)
        off = np.abs(found.astype(int) - expected)
        assert off.max() <= (2 if name == "CMYK" else 1)  # of which a product is made
        assert (off > 0).mean() < 0.02
        assert expected.std() > 10


@pytest.mark.long("whole commands", short=("PIL",))
@pytest.mark.parametrize(
    ("missing", "extra"), [("PIL", "train"), ("numba", "train"), ("nvidia.dali", "dali")]
)
def test_a_missing_package_names_its_extra(missing: str, extra: str) -> None:
    module = "dali" if extra == "dali" else "decode"
    code = f"import sys; sys.modules[{missing!r}] = None; import courier_fast.data.images.{module}"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert run.returncode == 1
    assert f'pip install "courier_fast[{extra}]"' in run.stderr


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="decoder: expected one of auto, dali.* got 'fast'"):
        make_decoder("fast")
    with pytest.raises(ValueError, match='expected device "cuda"'):
        make_decoder("dali", device="cpu")
    with pytest.raises(ValueError, match="size: expected at least 1 pixel, got 0"):
        make_decoder("pillow", 0)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photos at ../shared/data/jpeg-decode")
def test_photos_agree_with_the_reference(decoder: Decoder) -> None:
    files = [
        np.fromfile(f, np.uint8)
        for folder in sorted(PHOTOS.iterdir())
        for f in sorted(folder.glob("*.jpg"))[:12]
    ]
    seen = [Image.open(io.BytesIO(f)).convert("RGB") for f in files]
    rng = np.random.default_rng(0)
    windows = random_windows(rng, np.array([x.size[::-1] for x in seen]))
    flips = random_flips(rng, len(files))
    pictures, damaged = decoder.decode(files, windows, flips)
    assert not damaged.any()
    for picture, image, window, flip in zip(pixels_of(pictures), seen, windows, flips, strict=True):
        expected = resized(image, window, flip)
        limit = max(
            np.abs(resized(image, window, flip, shift=s) - expected).mean()
            for s in ((0.5, 0.5), (-0.5, 0.5))
        )
        assert np.abs(picture - expected).mean() <= limit + 2

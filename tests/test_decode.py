"""Decoders: the same picture from each, every kind of file, every kind of damage."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from courier_fast.data.decode import Decoder, exif_orientation, make_decoder, read_fast
from courier_fast.data.transforms import eval_windows, random_flips, random_windows

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE = 48
PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "jpeg-decode"


@pytest.fixture(scope="module", params=["software", "pillow", "dali-cpu"])
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    if request.param == "dali-cpu":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    decoder = make_decoder(request.param, SIZE, threads=2, mean=MEAN, std=STD)
    yield decoder
    decoder.close()


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with an edge: no finer detail than an interpolation may differ in."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    rng = np.random.default_rng(seed)
    a, b, c = rng.random((3, 3)) * 6
    pixels = 127 + 100 * np.sin(a * x[..., None] + b * y[..., None] + c)
    pixels[height // 3 :, : width // 2] *= 0.6
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> np.ndarray:
    file = io.BytesIO()
    image.save(
        file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}) | options
    )
    return np.frombuffer(file.getvalue(), np.uint8)


def pixels_of(pictures: torch.Tensor) -> torch.Tensor:
    """[n, H, W, 3] in 0 to 255."""
    return (pictures.permute(0, 2, 3, 1).float() * torch.tensor(STD) + torch.tensor(MEAN)) * 255


def whole(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1)), np.zeros(n, bool)


def expected(image: Image.Image, window: np.ndarray, flip: bool = False) -> np.ndarray:
    """Pillow's antialiased resize of the window in fractions of a pixel."""
    top, left, height, width = window * [image.height, image.width, image.height, image.width]
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    picture = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box))
    return picture[:, ::-1] if flip else picture


@pytest.mark.parametrize(
    ("height", "width"), [(SIZE, SIZE), (60, 90), (500, 500), (900, 1200), (37, 53), (7, 300)]
)
def test_windows_and_flips_give_the_picture(decoder: Decoder, height: int, width: int) -> None:
    image = scene(height, width)
    shapes = np.tile([[height, width]], (8, 1))
    rng = np.random.default_rng(1)
    windows, flips = random_windows(rng, shapes), random_flips(rng, 8)
    pictures, damaged = decoder.decode([encoded(image)] * 8, windows, flips)
    assert pictures.shape == (8, 3, SIZE, SIZE)
    assert pictures.is_contiguous(memory_format=torch.channels_last)
    assert not damaged.any()
    for picture, window, flip in zip(pixels_of(pictures), windows, flips, strict=True):
        difference = np.abs(picture.numpy() - expected(image, window, flip))
        # The edge may lie a pixel of the source off (windows in whole pixels), so: the mean, and most pixels closely. A window or flip
        # that is off by more would differ by tens everywhere: seen below.
        assert difference.mean() < 6
        assert np.median(difference) < 3
        if min(height, width) > SIZE:
            other = np.abs(picture.numpy() - expected(image, window, not flip)).mean()
            assert difference.mean() < other / 2


def test_colours_are_in_order_and_scale(decoder: Decoder) -> None:
    for colour in (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
        (0, 0, 0),
        (12, 130, 250),
    ):
        pictures, _ = decoder.decode([encoded(Image.new("RGB", (90, 70), colour))], *whole(1))
        assert pixels_of(pictures)[0].mean((0, 1)).tolist() == pytest.approx(colour, abs=3)


def exif_rotated(image: Image.Image, orientation: int) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif.tobytes())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(decoder: Decoder, orientation: int) -> None:
    image = scene(80, 120)
    file = exif_rotated(image, orientation)
    assert exif_orientation(file) == orientation
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    seen = image if orientation == 1 else image.transpose(undo[orientation])
    window = eval_windows(np.array([[seen.height, seen.width]]))
    pictures, damaged = decoder.decode([file], window, np.zeros(1, bool))
    assert not damaged.any()
    assert np.abs(pixels_of(pictures)[0].numpy() - expected(seen, window[0])).mean() < 6


def kinds() -> dict[str, tuple[np.ndarray, Image.Image]]:
    """A file of each kind, and what is to be seen."""
    image = scene(100, 80)
    grey = image.convert("L")
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 80, dtype=np.uint8), (100, 1))))
    over_white = Image.alpha_composite(Image.new("RGBA", alpha.size, "white"), alpha).convert("RGB")
    palette = image.quantize(64)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "grey": (encoded(grey), grey.convert("RGB")),
        "progressive": (encoded(image, progressive=True), image),
        "4:2:0": (encoded(image, subsampling=2), image),
        "CMYK": (encoded(image.convert("CMYK")), image),
        "PNG": (encoded(image, "PNG"), image),
        "PNG with alpha": (encoded(alpha, "PNG"), over_white),
        "PNG palette": (encoded(palette, "PNG"), palette.convert("RGB")),
        "PNG 16 bit": (encoded(deep, "PNG"), grey.convert("RGB")),
        "PNG grey and alpha": (
            encoded(alpha.convert("LA"), "PNG"),
            over_white.convert("L").convert("RGB"),
        ),
        "WebP": (encoded(image, "WEBP", quality=95), image),
        "BMP": (encoded(image, "BMP"), image),
        "GIF": (encoded(palette, "GIF"), palette.convert("RGB")),
    }


@pytest.mark.parametrize("kind", list(kinds()))
def test_every_kind_of_file(decoder: Decoder, kind: str) -> None:
    file, seen = kinds()[kind]
    pictures, damaged = decoder.decode([file], *whole(1))
    assert not damaged.any()
    difference = np.abs(pixels_of(pictures)[0].numpy() - expected(seen, whole(1)[0][0]))
    assert difference.mean() < 8
    assert np.median(difference) < 5


def damage() -> dict[str, np.ndarray]:
    good = encoded(scene(200, 160))
    header_only = np.concatenate([good[:700], np.frombuffer(b"\xff\xd9", np.uint8)])
    return {
        "missing": good[:0],
        "one byte": good[:1],
        "half": good[: len(good) // 2],
        "cut before the end": good[:-400],
        "header and end alone": header_only,
        "garbage": np.random.default_rng(0).integers(0, 256, 5000, np.uint8),
        "a web page": np.frombuffer(b"<!DOCTYPE html><html><body>404</body></html>" * 9, np.uint8),
        "zeros": np.zeros(4000, np.uint8),
        "half a PNG": encoded(scene(200, 160), "PNG")[:3000],
        "a bomb": encoded(Image.new("1", (20000, 20000)), "PNG"),
    }


@pytest.mark.parametrize("what", list(damage()))
def test_a_damaged_image_is_neutral_and_its_neighbours_are_untouched(
    decoder: Decoder, what: str
) -> None:
    good = [encoded(scene(90, 120, seed)) for seed in range(5)]
    images = [*good[:2], damage()[what], *good[2:]]
    pictures, damaged = decoder.decode(images, *whole(6))
    # Pillow and DALI take libjpeg's filling for the picture where only the middle is gone; prepare, which reads strictly, does not.
    seen = what != "header and end alone" or getattr(decoder, "read", None) is read_fast
    assert damaged.tolist() == [False, False, seen, False, False, False]
    assert not seen or (pictures[2] == 0).all()
    alone, none = decoder.decode(good, *whole(5))
    assert not none.any()
    kept = pictures[torch.tensor([0, 1, 3, 4, 5])]
    # DALI gives up a batch that surprises it, and the software decoder does it: the same but for interpolation.
    assert torch.equal(kept, alone) or (
        hasattr(decoder, "on_gpu") and (kept - alone).abs().mean() < 0.05
    )
    again, _ = decoder.decode(good, *whole(5))
    assert torch.equal(again, alone), "the decoder is as good as new"


def test_no_images(decoder: Decoder) -> None:
    pictures, damaged = decoder.decode([], *whole(0))
    assert pictures.shape == (0, 3, SIZE, SIZE)
    assert damaged.shape == (0,)


def test_batches_of_any_size_in_turn(decoder: Decoder) -> None:
    files = [encoded(scene(90, 120, seed)) for seed in range(40)]
    windows, flips = whole(40)
    everything, _ = decoder.decode(files, windows, flips)
    for n in (1, 40, 7, 39):
        assert torch.equal(decoder.decode(files[:n], windows[:n], flips[:n])[0], everything[:n])


@pytest.mark.parametrize("kind", ["software", "pillow"])
def test_threads_change_nothing(kind: str) -> None:
    files = [encoded(scene(90 + s, 120, s)) for s in range(20)]
    results = [make_decoder(kind, SIZE, threads=t).decode(files, *whole(20))[0] for t in (1, 3)]
    assert torch.equal(*results)


def test_half_precision() -> None:
    files = [encoded(scene(90, 120))]
    full, half = (
        make_decoder("software", SIZE, dtype=d).decode(files, *whole(1))[0]
        for d in (torch.float32, torch.float16)
    )
    assert half.dtype == torch.float16
    assert torch.equal(full.half(), half)


def test_wrong_kinds() -> None:
    with pytest.raises(ValueError, match="decoder: expected one of auto, dali.* got 'fast'"):
        make_decoder("fast")
    pytest.importorskip("nvidia.dali")
    with pytest.raises(ValueError, match='expected device "cuda"'):
        make_decoder("dali", device="cpu")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photos at ../shared/data/jpeg-decode")
def test_photos_agree_between_decoders(decoder: Decoder) -> None:
    files = [
        np.fromfile(f, np.uint8)
        for folder in sorted(PHOTOS.iterdir())
        for f in sorted(folder.glob("*.jpg"))[:12]
    ]
    shapes = np.array([Image.open(io.BytesIO(memoryview(f))).size[::-1] for f in files])
    rng = np.random.default_rng(0)
    windows, flips = random_windows(rng, shapes), random_flips(rng, len(files))
    found, damaged = decoder.decode(files, windows, flips)
    plain, _ = make_decoder("pillow", SIZE, mean=MEAN, std=STD).decode(files, windows, flips)
    assert not damaged.any()
    # The decoders differ in antialiasing and by part of a pixel in the window: nothing beside taking another picture, or its mirror image.
    own = (pixels_of(found) - pixels_of(plain)).abs().mean((1, 2, 3))
    assert own.median() < 4
    for i in range(len(files)):
        others = (pixels_of(found[i : i + 1]) - pixels_of(plain)).abs().mean((1, 2, 3))
        mirrored = (pixels_of(found[i : i + 1]) - pixels_of(plain[i : i + 1].flip(3))).abs().mean()
        assert own[i] < 0.5 * others[torch.arange(len(files)) != i].min()
        assert own[i] < mirrored

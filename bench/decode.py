"""Decoding: encoded photos to random crops of 224 px, flipped and normalised.

Images/s of the decoders and of what users write.

python -m bench.decode [--images FOLDER] [--size 224] [--batch 128] [--threads 2]
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from bench.command import line_of
from bench.measure import surroundings
from courier_fast.data.images.decode import Decoder, make_decoder
from courier_fast.data.images.pictures import pixel_slices, read_pillow
from courier_fast.data.images.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    random_flips,
    random_windows,
)

Array = npt.NDArray
Work = Callable[[], object]

BASELINE = "dali-cpu"


def photo(rng: np.random.Generator, side: int = 500) -> Array:
    """A JPEG like a photo of that size (about 55 KB at 500): smooth colours, a texture, grain."""

    def noise(cells: int) -> Array:
        field = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        return np.asarray(field.resize((side, side), Image.Resampling.BICUBIC))

    grey = sum(60 * 0.62**k * noise(4 * 2**k) for k in range(6))
    texture = 20 * np.maximum(noise(5), 0) * rng.standard_normal((side, side))
    pixels = 128 + (grey + texture)[..., None] + 20 * np.stack([noise(6) for _ in range(3)], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=80)
    return np.frombuffer(file.getvalue(), np.uint8)


# ---- what users write ----------------------------------------------------------------------------


def _normalised(picture: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (picture / 255 - mean) / std


class PillowDataset(torch.utils.data.Dataset):  # for the DataLoader
    """One normalised crop per index, by Pillow."""

    def __init__(self, images: list[Array], windows: Array, flips: Array, size: int) -> None:
        self.images, self.windows, self.flips, self.size = images, windows, flips, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        picture = read_pillow(self.images[i], self.windows[i], self.size)
        picture = picture[:, ::-1] if self.flips[i] else picture
        return _normalised(torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1))


def one_by_torchvision(image: Array, window: Array, flip: bool, size: int) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional

    picture = decode_jpeg(torch.from_numpy(image.copy()), mode=ImageReadMode.RGB)
    rows, columns = pixel_slices(window, *picture.shape[1:])
    picture = functional.resize(picture[:, rows, columns], [size, size], antialias=True)
    return _normalised(picture.flip(2) if flip else picture)


# ---- candidates ----------------------------------------------------------------------------------


def candidates(
    names: Sequence[str],
    images: list[Array],
    windows: Array,
    flips: Array,
    size: int,
    batch: int,
    threads: int,
) -> tuple[dict[str, Work], dict[str, str]]:
    """What decodes all the images once, in batches; and why the others cannot."""
    slices = [slice(i, i + batch) for i in range(0, len(images), batch)]
    works: dict[str, Work] = {}
    refused: dict[str, str] = {}

    def by_decoder(decoder: Decoder) -> None:
        for s in slices:
            _, damaged = decoder.decode(images[s], windows[s], flips[s])
            assert not damaged.any()
        if decoder.device.type == "cuda":
            torch.cuda.synchronize()

    def bare_dali(decoder: Any) -> None:
        """The pipeline's run alone, its output left where it is."""
        for s in slices:
            rows = np.arange(len(images[s]))
            decoder._run(rows, images[s], windows[s], flips[s].astype(np.int32))

    def by_torchvision(pool: ThreadPoolExecutor) -> None:
        for s in slices:
            torch.stack(
                list(
                    pool.map(
                        partial(one_by_torchvision, size=size), images[s], windows[s], flips[s]
                    )
                )
            )

    def by_loader(loader: torch.utils.data.DataLoader) -> None:
        for _ in loader:
            pass

    for name in names:
        try:
            if name == "torchvision":
                import torchvision.io  # noqa: F401

                works[name] = partial(by_torchvision, ThreadPoolExecutor(threads))
            elif name == "dataloader":
                loader = torch.utils.data.DataLoader(
                    PillowDataset(images, windows, flips, size),
                    batch_size=batch,
                    num_workers=threads,
                    persistent_workers=True,
                    # A fork would inherit thread pools that do not run.
                    multiprocessing_context="spawn",
                )
                works[name] = partial(by_loader, loader)
            else:
                kind = "dali-cpu" if name == "dali-cpu bare" else name
                device = "cuda" if kind == "dali" else "cpu"
                decoder = make_decoder(kind, size, device=device, threads=threads)
                works[name] = partial(bare_dali if name.endswith("bare") else by_decoder, decoder)
        except ModuleNotFoundError as error:
            refused[name] = str(error)
    return works, refused


NAMES = ("software", "pillow", "dali-cpu", "dali-cpu bare", "torchvision", "dataloader", "dali")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--images", type=Path, help="folder of JPEGs (default: generated, 500 x 500)"
    )
    parser.add_argument("--count", type=int, default=256, help="images per repeat")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    if args.images is None:
        files = [photo(rng) for _ in range(48)]
    else:
        paths = sorted(p for p in args.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not paths:
            raise SystemExit(f"--images: expected a folder with JPEGs, got {args.images}")
        files = [np.fromfile(p, np.uint8) for p in paths]
    images = [files[i % len(files)] for i in range(args.count)]
    shapes = np.array([Image.open(io.BytesIO(f.tobytes())).size[::-1] for f in files])
    shapes = shapes[np.arange(args.count) % len(files)]
    windows, flips = random_windows(rng, shapes), random_flips(rng, args.count)

    names = [n for n in args.only if n != "dali" or torch.cuda.is_available()]
    works, refused = candidates(names, images, windows, flips, args.size, args.batch, args.threads)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    busy: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(args.repeats):  # in turns: all see the same machine
        for name, work in works.items():
            start, before = time.perf_counter(), time.process_time()
            work()
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - before)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(line_of(surroundings(device)))
    print(
        f"{args.count} of {len(files)} photos, {np.mean([len(f) for f in files]) / 1000:.0f} KB, "
        f"median {np.median(shapes, 0).astype(int).tolist()} px, "
        f"to {args.size} px, batches of {args.batch}, {args.threads} threads, {args.repeats} "
        "repeats in turns\n"
    )
    rates = {k: np.quantile(args.count / np.array(v), [0.2, 0.5, 0.8]) for k, v in seconds.items()}
    # CPU time of this process tells more than the clock where others use the machine too.
    print(f"{'':15}{'images/s':>9}  {'(p20 - p80)':15}{'CPU us/image':>14}{'over ' + BASELINE:>14}")
    for name, (low, mid, high) in rates.items():
        # Repeats are paired: what slows the machine slows neighbours alike.
        ratio = (
            f"{np.median(np.array(seconds[BASELINE]) / np.array(seconds[name])):14.2f}"
            if BASELINE in seconds
            else ""
        )
        cpu = "" if name == "dataloader" else f"{np.median(busy[name]) / args.count * 1e6:.0f}"
        print(f"{name:15}{mid:9.0f}  {f'({low:.0f} - {high:.0f})':15}{cpu:>14}{ratio}")
    for name, reason in refused.items():
        print(f"{name:15}{reason}")


if __name__ == "__main__":
    main()

"""Draws a catalogue: garments in patterns and palettes, photographed badly.

What users care about (pattern, palette, cut) is apart from what fills the pixels: the garment's
shape and place, its rotation, the background and the light. A palette is several hues and not one,
so a picture's mean colour says little about it either.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFilter

Floats = npt.NDArray[np.float32]
Points = list[tuple[float, float]]

SIDE = 144  # pixels of a picture
FINE = 2  # drawn this much larger, then shrunk

PALETTES = {
    "mono": ("#f2f2f0", "#b9bbbd", "#6b6e72", "#1d1f22"),
    "earth": ("#7a4a26", "#c58f3d", "#6d7032", "#ead9b8"),
    "pastel": ("#f6bccb", "#b5e3cf", "#cfc1ee", "#fbe9ac"),
    "marine": ("#17284f", "#f4f2ea", "#c42a33", "#4f86b8"),
    "neon": ("#c9f227", "#ff2f9c", "#ff8a1f", "#16d6e0"),
    "jewel": ("#0b6b52", "#7c1435", "#3b2a86", "#d3a02a"),
}
PATTERNS = ("plain", "stripes", "checks", "dots", "floral", "emblem")
CUTS = ("fitted", "loose")


@dataclass(frozen=True)
class Part:
    """A closed outline in the garment's own frame: x to the right and y down, the garment in about
    [-1, 1]."""

    outline: Points
    kind: str  # "fabric" takes the pattern, "trim" the accent colour, "line" is a dark seam
    rounds: int = 2  # of corner cutting


def _both(*right: tuple[float, float]) -> Points:
    """The outline whose right half this is, from top to bottom."""
    return [*right, *((-x, y) for x, y in reversed(right))]


def _seam(*points: tuple[float, float], width: float = 0.012) -> Part:
    """A thin band along a path."""
    path = np.array(points)
    step = np.gradient(path, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], 1) / np.linalg.norm(step, axis=1, keepdims=True)
    there, back = path + width * normal, path - width * normal
    return Part([(float(x), float(y)) for x, y in [*there, *back[::-1]]], "line", 0)


def _top(w: float, long: float, sleeve: float, reach: float) -> list[Part]:
    """T-shirt, long-sleeve: `w` half the width of the body, `long` its hem, the sleeve to (`reach`,
    `sleeve`)."""
    body = _both(
        (0.16, -0.66),
        (0.42, -0.62),
        (reach, sleeve),
        (reach - 0.24, sleeve + 0.14),
        (w, -0.16),
        (w * 1.04, long),
    )
    neck = [(0.2 * np.cos(a), -0.68 + 0.15 * np.sin(a)) for a in np.linspace(0, np.pi, 9)]
    return [Part(body, "fabric"), Part(neck, "trim", 1)]


def t_shirt(w: float, rng: np.random.Generator) -> list[Part]:
    return _top(0.46 * w, rng.uniform(0.6, 0.8), -0.2, 0.86)


def long_sleeve(w: float, rng: np.random.Generator) -> list[Part]:
    low = rng.uniform(0.42, 0.6)
    cuff = [(0.98, low), (0.74, low + 0.14), (0.72, low + 0.02), (0.94, low - 0.1)]
    parts = _top(0.44 * w, rng.uniform(0.62, 0.8), low, 0.98)
    return [*parts, Part(cuff, "trim", 1), Part([(-x, y) for x, y in cuff], "trim", 1)]


def jacket(w: float, rng: np.random.Generator) -> list[Part]:
    long, low = rng.uniform(0.66, 0.88), rng.uniform(0.42, 0.56)
    parts = _top(0.5 * w, long, low, 1.0)[:1]
    lapel = [(0.17, -0.67), (0.34, -0.3), (0.03, 0.05), (0.0, -0.3)]
    buttons = [
        Part(
            [(0.07 + 0.035 * np.cos(a), y + 0.035 * np.sin(a)) for a in np.linspace(0, 6, 8)],
            "trim",
            1,
        )
        for y in (0.2, 0.4)
    ]
    lapels = [Part(lapel, "trim", 1), Part([(-x, y) for x, y in lapel], "trim", 1)]
    return [*parts, *lapels, *buttons, _seam((0, 0.0), (0, long))]


def trousers(w: float, rng: np.random.Generator) -> list[Part]:
    hem, long = 0.2 * w, rng.uniform(0.82, 0.98)
    outline = _both(
        (0.34, -0.92), (0.42 * w, -0.4), (0.4 + 0.06 * w, long), (0.4 - hem, long), (0.03, -0.32)
    )
    belt = _both((0.35, -0.94), (0.36, -0.82))
    return [Part(outline, "fabric", 1), Part(belt, "trim", 0), _seam((0, -0.82), (0, -0.32))]


def skirt(w: float, rng: np.random.Generator) -> list[Part]:
    hem, long = 0.62 * w, rng.uniform(0.5, 0.8)
    outline = _both((0.3, -0.64), (0.42, -0.3), (hem, long), (0.0, long + 0.08))
    folds = [_seam((x * 0.4, -0.4), (x * hem, long - 0.04), width=0.008) for x in (-0.5, 0.0, 0.5)]
    return [
        Part(outline, "fabric", 1),
        Part(_both((0.31, -0.68), (0.33, -0.56)), "trim", 0),
        *folds,
    ]


def dress(w: float, rng: np.random.Generator) -> list[Part]:
    hem, long = 0.6 * w, rng.uniform(0.72, 0.96)
    outline = _both(
        (0.2, -0.94),
        (0.34, -0.92),
        (0.36, -0.5),
        (0.25 * w, -0.16),
        (hem, long),
        (0.0, long + 0.06),
    )
    neck = [(0.22 * np.cos(a), -0.95 + 0.26 * np.sin(a)) for a in np.linspace(0, np.pi, 9)]
    return [
        Part(outline, "fabric"),
        Part(neck, "hole", 1),
        Part(_both((0.25 * w, -0.2), (0.27 * w, -0.1)), "trim", 0),
    ]


def shoe(w: float, rng: np.random.Generator) -> list[Part]:
    rise = rng.uniform(0.3, 0.62)
    upper = [
        (-0.86, -rise),
        (-0.4, -rise),
        (-0.24, -0.16),
        (0.3, 0.0),
        (0.86, 0.16 - 0.06 * w),
        (0.94, 0.4),
        (-0.9, 0.4),
    ]
    sole = [(-0.95, 0.36), (0.98, 0.36), (0.98, 0.4 + 0.12 * w), (-0.95, 0.4 + 0.12 * w)]
    laces = [
        _seam((x, -0.16 + 0.3 * x + 0.12), (x + 0.2, -0.06 + 0.3 * x)) for x in (-0.2, -0.04, 0.12)
    ]
    return [Part(upper, "fabric"), Part(sole, "trim", 1), *laces]


def bag(w: float, rng: np.random.Generator) -> list[Part]:
    high, wide = rng.uniform(0.25, 0.4), 0.62 * w
    body = _both((0.86 * wide, -high + 0.1), (wide, 0.62))
    arc = [
        (0.62 * wide * np.cos(a), -high + 0.12 - 0.55 * np.sin(a))
        for a in np.linspace(0, np.pi, 15)
    ]
    handle = Part(_seam(*arc, width=0.045).outline, "trim", 0)
    flap = _seam((-0.9 * wide, -0.05), (0.0, 0.08), (0.9 * wide, -0.05), width=0.01)
    return [handle, Part(body, "fabric", 1), flap]


def hat(w: float, rng: np.random.Generator) -> list[Part]:
    high, brim = rng.uniform(0.5, 0.75), 0.82 + 0.14 * w
    crown = _both((0.2, -high), (0.5, -high * 0.8), (0.58, 0.18))
    edge = [(brim * np.cos(a), 0.22 + 0.2 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 24)]
    band = _both((0.555, -0.02), (0.585, 0.16))
    return [Part(edge, "fabric", 0), Part(crown, "fabric"), Part(band, "trim", 0)]


def scarf(w: float, rng: np.random.Generator) -> list[Part]:
    wide, low = 0.2 * w, rng.uniform(0.6, 0.9)
    ring = [(0.56 * np.cos(a), -0.5 + 0.3 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 20)]
    hole = [(0.3 * np.cos(a), -0.56 + 0.13 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 20)]
    tails = [
        Part(
            [(x, -0.36), (x + wide, -0.34), (x + wide + lean, low + d), (x + lean, low + d)],
            "fabric",
            1,
        )
        for x, lean, d in ((-0.16, -0.16, 0.0), (0.06, 0.14, -0.14))
    ]
    ends = [
        Part(
            [
                (x + lean, low + d - 0.05),
                (x + wide + lean, low + d - 0.05),
                (x + wide + lean, low + d + 0.05),
                (x + lean, low + d + 0.05),
            ],
            "trim",
            0,
        )
        for x, lean, d in ((-0.16, -0.16, 0.0), (0.06, 0.14, -0.14))
    ]
    return [Part(ring, "fabric", 0), Part(hole, "hole", 0), *tails, *ends]


GARMENTS: dict[str, Callable[[float, np.random.Generator], list[Part]]] = {
    "t-shirt": t_shirt,
    "long-sleeve": long_sleeve,
    "jacket": jacket,
    "trousers": trousers,
    "skirt": skirt,
    "dress": dress,
    "shoe": shoe,
    "bag": bag,
    "hat": hat,
    "scarf": scarf,
}


@dataclass(frozen=True)
class Item:
    """What a product is; how its picture was taken is drawn from the same seed."""

    item_id: str
    category: str
    pattern: str
    palette: str
    cut: str


def make_item(index: int, seed: int) -> Item:
    """The item of that index, whatever the others: a longer catalogue begins with the shorter."""
    rng = np.random.default_rng([seed, index, 0])
    draw = [list(names)[rng.integers(len(names))] for names in (GARMENTS, PATTERNS, PALETTES, CUTS)]
    return Item(f"{index:05}", *draw)


# ---- patterns: how much of a pixel the accent and the second accent cover, from coordinates u, v
# in the garment's frame


PERIODS = {
    "stripes": (0.16, 0.34),
    "checks": (0.22, 0.4),
    "dots": (0.22, 0.34),
    "floral": (0.4, 0.56),
}


def _phase(x: npt.NDArray) -> npt.NDArray:
    return x - np.floor(x)


def _pattern(
    kind: str, u: Floats, v: Floats, rng: np.random.Generator
) -> tuple[npt.NDArray, npt.NDArray]:
    none = np.zeros_like(u)
    if kind == "plain":
        return none, none
    if kind == "emblem":
        x, y = u / rng.uniform(0.2, 0.28), (v - rng.uniform(-0.1, 0.1)) / rng.uniform(0.2, 0.28)
        r, a = np.hypot(x, y), np.arctan2(y, x)
        corners = rng.integers(0, 6)
        # Circle, bar, and polygons or stars by the distance of their sides.
        if corners == 0:
            inside = r < 0.95
        elif corners == 1:
            inside = (np.abs(x) < 1.25) & (np.abs(y) < 0.5)
        else:
            n = int(corners) + 1
            inside = r * np.cos((a + np.pi / 2 + np.pi / n) % (2 * np.pi / n) - np.pi / n) < 0.75
        return inside.astype(np.float32), (inside & (r < 0.35)).astype(np.float32)
    angle = float(rng.choice([0.0, 0.5, 0.25, -0.25])) * math.pi + rng.normal(0, 0.05)
    s, t = math.cos(angle) * u + math.sin(angle) * v, math.cos(angle) * v - math.sin(angle) * u
    period = rng.uniform(*PERIODS[kind])
    s, t = s / period, t / period
    if kind == "stripes":
        return (_phase(s) < rng.uniform(0.35, 0.6)).astype(np.float32), none
    if kind == "checks":
        across, along = ((_phase(x) < 0.5).astype(np.float32) for x in (s, t))
        return 0.5 * (across + along), none
    # Every other row is shifted by half a cell.
    row = np.floor(t)
    s = s + 0.5 * (row - 2 * np.floor(0.5 * row))
    column = np.floor(s)
    x, y = s - column - 0.5, t - row - 0.5
    r = np.hypot(x, y)
    if kind == "dots":
        return (r < rng.uniform(0.24, 0.34)).astype(np.float32), none
    # Flowers: five petals, turned from cell to cell.
    petals = r < 0.31 * (1 + 0.38 * np.cos(5 * np.arctan2(y, x) + 2.4 * column + 1.7 * row))
    heart = r < 0.12
    return (petals & ~heart).astype(np.float32), heart.astype(np.float32)


# ---- picture -------------------------------------------------------------------------------------


def _cut_corners(points: Points, rounds: int) -> npt.NDArray[np.float64]:
    """Chaikin's corner cutting of a closed outline."""
    p = np.array(points, np.float64)
    for _ in range(rounds):
        q = np.roll(p, -1, 0)
        p = np.stack([0.8 * p + 0.2 * q, 0.2 * p + 0.8 * q], 1).reshape(-1, 2)
    return p


def _shrink(plane: npt.NDArray) -> npt.NDArray:
    """Means of FINE x FINE pixels; sums of slices are far faster than a mean over two axes."""
    rows = np.add.reduce([plane[i::FINE] for i in range(FINE)])
    return np.add.reduce([rows[:, i::FINE] for i in range(FINE)]) / FINE**2


def _blur(plane: npt.NDArray, radius: float) -> npt.NDArray:
    image = Image.fromarray((255 * plane).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, np.float32) / 255


def _rgb(colour: str) -> npt.NDArray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.float32) / 255


def _background(rng: np.random.Generator, x: npt.NDArray, y: npt.NDArray) -> npt.NDArray:
    """A tinted wall [side, side, 3] with a gradient and grain, on some a floor."""
    hue = rng.random() + np.array([0, 1 / 3, 2 / 3])
    tint = rng.uniform(0.0, 0.4) * (0.5 + 0.5 * np.cos(2 * np.pi * hue))
    wall = rng.uniform(0.5, 1.0) * (1 - tint).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    gradient = 1 + rng.uniform(0, 0.22) * (math.cos(angle) * x + math.sin(angle) * y)
    if rng.random() < 0.35:
        gradient = gradient * np.where(
            y > rng.uniform(0.35, 0.75), np.float32(rng.uniform(0.75, 0.92)), np.float32(1)
        )
    grain = rng.uniform(0.0, 0.03) * rng.standard_normal((SIDE, SIDE), np.float32)
    return wall * (gradient + grain)[..., None]


def draw_item(item: Item, index: int, seed: int) -> bytes:
    """The item's picture, a JPEG of SIDE x SIDE pixels; the same bytes for the same arguments."""
    rng = np.random.default_rng([seed, index, 1])
    width = rng.uniform(0.72, 0.86) if item.cut == "fitted" else rng.uniform(1.08, 1.24)
    parts = GARMENTS[item.category](width, rng)

    # From the garment's frame to pixels: mirrored, turned, scaled, moved.
    angle, scale = rng.normal(0, 0.16), SIDE * rng.uniform(0.34, 0.45)
    mirror = rng.choice([-1.0, 1.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    frame = scale * turn * [mirror, 1.0]
    centre = SIDE / 2 + SIDE * rng.uniform(-0.09, 0.09, 2)

    masks = {k: Image.new("L", (SIDE * FINE, SIDE * FINE)) for k in ("fabric", "trim", "line")}
    for part in parts:
        pixels = FINE * (_cut_corners(part.outline, part.rounds) @ frame.T + centre)
        outline = [(x, y) for x, y in pixels.tolist()]
        for kind, mask in masks.items():
            if part.kind == "hole" or kind == part.kind:
                ImageDraw.Draw(mask).polygon(outline, fill=0 if part.kind == "hole" else 255)
    fabric, trim, line = (_shrink(np.asarray(m, np.float32)) / 255 for m in masks.values())

    grid = (np.arange(SIDE * FINE, dtype=np.float32) + 0.5) / FINE
    inverse = np.linalg.inv(frame).astype(np.float32)
    dx, dy = grid[None, :] - np.float32(centre[0]), grid[:, None] - np.float32(centre[1])
    u, v = (inverse[i, 0] * dx + inverse[i, 1] * dy for i in (0, 1))
    accent, second = (_shrink(p) for p in _pattern(item.pattern, u, v, rng))

    colours = [_rgb(c) for c in PALETTES[item.palette]]
    base, other, third = (colours[i] for i in rng.permutation(len(colours))[:3])
    cloth = base + accent[..., None] * (other - base)
    cloth = cloth + second[..., None] * (third - cloth)
    # The trim of a plain garment shows the palette's other colours too.
    cloth = cloth + trim[..., None] * (other - cloth)
    solid = np.maximum(fabric, trim)
    folds = 1 + 0.06 * np.sin(rng.uniform(4, 9) * _shrink(u) + 3 * _shrink(v) + rng.uniform(0, 6))
    shade = folds * (0.7 + 0.3 * _blur(solid, 5.0)) * (1 - 0.55 * line)

    side = np.linspace(-1, 1, SIDE, dtype=np.float32)
    x, y = np.broadcast_arrays(side[None, :], side[:, None])
    back = _background(rng, x, y)
    shadow = np.roll(_blur(solid, rng.uniform(3, 8)), rng.integers(-7, 8, 2), (0, 1))
    back = back * (1 - rng.uniform(0.15, 0.5) * shadow)[..., None]
    picture = back + solid[..., None] * (cloth * shade[..., None] - back)
    warm = rng.normal(0, 0.05)
    light = rng.uniform(0.78, 1.12) * np.array([1 + warm, 1.0, 1 - warm], np.float32)
    slope = 1 + rng.uniform(-0.15, 0.15) * x + rng.uniform(-0.15, 0.15) * y
    picture = picture * light * slope[..., None]
    picture += 0.012 * rng.standard_normal(picture.shape, np.float32)
    file = io.BytesIO()
    pixels = (255 * picture.clip(0, 1)).round().astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=88)
    return file.getvalue()


def draw_catalogue(
    folder: str | os.PathLike[str],
    count: int,
    seed: int = 0,
    advance: Callable[[], object] | None = None,
) -> pa.Table:
    """Writes <item_id>.jpg for `count` items.

    Args:
        advance: called after each picture.

    Returns:
        A row per item: item_id, category, pattern, palette, cut (all text).

    Raises:
        ValueError: `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = [make_item(i, seed) for i in range(count)]

    def write(index: int) -> None:
        (folder / f"{items[index].item_id}.jpg").write_bytes(draw_item(items[index], index, seed))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(write, range(count)):
            if advance:
                advance()
    return pa.Table.from_pylist([asdict(item) for item in items])

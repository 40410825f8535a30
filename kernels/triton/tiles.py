"""Tile choices, in one place. The numbers behind them are in README.md."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, warps, software pipeline stages, how many programs of it fit on a
    multiprocessor at once, and how many registers a thread may have.

    Where that is left to it (None), ptxas gives up registers for more programs on a multiprocessor,
    and with some versions spills a few bytes for that.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    per_processor: int = 1
    registers: int | None = None

    @property
    def launch(self) -> dict[str, int | None]:
        """Triton's own arguments of a launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.registers,
        }


@dataclass(frozen=True)
class Choice:
    """A tile of the contrast's passes for rows of up to `stride` elements, and its origin."""

    kinds: tuple[str, ...]
    stride: int
    tile: Tile
    source: str


# Passes of the contrast: forward with and without the sum of values, transposed, and those of the
# click sequence's masks by id, page and place.
KINDS = ("forward", "lse", "transposed", "sequence")

# 16-bit rows. The first row that fits is taken; TFLOP/s are of a plain pass on an H100 (README.md).
TILES_16: tuple[Choice, ...] = (
    Choice(KINDS, 64, Tile(64, 64, 4, 2, 3), "538 TFLOP/s; three by registers"),
    Choice(KINDS, 128, Tile(64, 128, 4, 2, 2), "653 TFLOP/s; two by shared memory"),
    Choice(("sequence",), 256, Tile(128, 32, 8, 3), "fits without spills"),
    Choice(KINDS, 256, Tile(128, 64, 8, 3), "729 TFLOP/s"),
)
# float32 rows, tf32 products.
TILES_32: tuple[Choice, ...] = (
    Choice(KINDS, 64, Tile(64, 32, 4, 2), "fits without spills"),
    Choice(KINDS, 256, Tile(64, 32, 8, 2), "fits without spills"),
)
# GPUs with 99 KiB of shared memory a block (compute capability 8.6, 8.9, 12.x): what fits.
SMALL_16: tuple[Choice, ...] = (
    Choice(KINDS, 64, Tile(64, 64, 4, 2, 2), "fits"),
    Choice(KINDS, 128, Tile(64, 64, 4, 2), "fits"),
    Choice(KINDS, 256, Tile(64, 32, 4, 2), "fits"),
)
SMALL_32: tuple[Choice, ...] = (
    Choice(KINDS, 64, Tile(64, 32, 4, 2), "fits"),
    Choice(KINDS, 128, Tile(32, 32, 4, 2), "fits"),
    Choice(KINDS, 256, Tile(32, 16, 4, 2), "fits"),
)
# Bytes of shared memory that a block can have, by compute capability: a kernel that wants more
# compiles but cannot be launched.
_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
SHARED_MEMORY = {capability: 1024 * kib for capability, kib in _KIB.items()}
# Below it, a GPU has 99 KiB.
_LARGE = 160 * 1024
# Attention for each candidate: bytes of shared memory for each dimension of its rows (block_dim),
# without gradients and with them, as compiled with any options: operands of products, 16 rows of q,
# k, v and dL/dR at once. Smaller tiles there are not: a product sums over at least 16 rows.
CANDIDATE_BYTES: dict[Any, tuple[int, int]] = {
    "ieee": (192, 384),
    "tf32": (192, 384),
    torch.float16: (96, 224),  # gradients in float32
    torch.bfloat16: (96, 144),
}
# The compute capability that tiles are chosen for where there is no GPU to ask: what kernels are
# compiled for.
TARGET = 90

# Of a thread.
MOST_REGISTERS = 255
# Rows per program of the bookkeeping kernels, and of the memory-bound ones.
BLOCK_PLAN = 1024
LARGEST_REGISTER_DIM = 256  # above it the accumulator spills: the chunked path takes over


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def next_power_of_2(n: int) -> int:
    return 1 << max(int(n) - 1, 0).bit_length()


def block_dim(dim: int) -> int:
    """The embedding dimension in registers: a power of two, at least a matrix instruction's."""
    return max(16, next_power_of_2(dim))


def row_stride(dim: int, chunked: bool) -> int:
    """Row length of the normalised buffers: padded with zeros, so that the inner loops need no mask
    over D."""
    return -(-dim // 64) * 64 if chunked else block_dim(dim)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device) -> int:
    """Programs that fill the device once: few row tiles are split along columns up to that."""
    return _processors(device) if device.type == "cuda" else 4


# (type, kind, stride) -> tile. What `bench.tune` tries; None: what it wrote, if COURIER_FAST_TILES
# names the file.
Tuned = dict[tuple[str, str, int], Tile]
OVERRIDE: Tuned | None = None


@functools.cache
def tuned() -> Tuned:
    """The user's own tiles: the file that the environment variable COURIER_FAST_TILES names, as
    `bench.tune` writes it."""
    path = os.environ.get("COURIER_FAST_TILES")
    return {} if not path else read_tiles(Path(path))


def read_tiles(path: Path) -> Tuned:
    """Tiles from a JSON list of {"type", "kind", "stride", "tile": {...}}; ValueError says what is
    wrong with it."""
    try:
        entries = json.loads(path.read_text())
        found = {(x["type"], x["kind"], x["stride"]): Tile(**x["tile"]) for x in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"COURIER_FAST_TILES: expected a file that bench.tune wrote, got {path}: {error!r}"
        ) from error
    for (width, kind, stride), tile in found.items():
        sizes = [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, tile.per_processor]
        known = width in ("16-bit", "float32") and kind in KINDS and isinstance(stride, int)
        if not known or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ValueError(
                f"COURIER_FAST_TILES: expected types 16-bit or float32, kinds {', '.join(KINDS)} "
                "and positive sizes, "
                f"got {width!r}, {kind!r}, {stride!r}, {tile} in {path}"
            )
        if any(n & (n - 1) or n < 16 for n in sizes[:2]):
            raise ValueError(
                "COURIER_FAST_TILES: expected rows and columns that are powers of two from 16, "
                f"got {tile} in {path}"
            )
    return found


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """90 for sm_90."""
    return _capability(device) if device.type == "cuda" else TARGET


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def shared_memory(device: torch.device) -> int:
    """Bytes that a block can have."""
    if device.type == "cuda":
        return _shared_memory(device)
    return SHARED_MEMORY.get(TARGET, 99 * 1024)


def candidate_bytes(dtype: torch.dtype, dim: int, gradients: bool) -> int:
    """Shared memory that attention for each candidate needs."""
    kind = dot_precision(dtype) if dtype == torch.float32 else dtype
    return CANDIDATE_BYTES[kind][gradients] * block_dim(dim)


def contrast_tile(
    dtype: torch.dtype, stride: int, device: torch.device, kind: str = "forward"
) -> Tile:
    """The tile of a pass over rows of `stride` elements: the user's, or of the tables above."""
    width = "float32" if dtype == torch.float32 else "16-bit"
    own = (tuned() if OVERRIDE is None else OVERRIDE).get((width, kind, stride))
    if own is not None:
        return own
    if interpreted():
        return Tile(32, 32, 4, 1)
    small = shared_memory(device) < _LARGE
    if dtype == torch.float32:
        table = SMALL_32 if small else TILES_32
    else:
        table = SMALL_16 if small else TILES_16
    # A stride above the largest one is that of the chunked path, which has tiles of its own.
    return next((c.tile for c in table if kind in c.kinds and stride <= c.stride), table[-1].tile)


def attention_tile(dtype: torch.dtype, stride: int, heads: int, backward: bool) -> Tile:
    """Attention over short histories: block_m PV rows by block_n history rows."""
    if stride > 256:
        return Tile(16, 16, 8, 1)
    # The backward's products run in float32 unless the rows are bfloat16 (loss.py); heads take
    # masked copies.
    wide = dtype == torch.float32 or (backward and (dtype == torch.float16 or heads > 1))
    stages = 3 if wide or backward else 2
    if stride > 128 and dot_precision(dtype) == "ieee":
        # Backward, blocks that are loaded ahead take registers that the products need: 328 bytes
        # spilled.
        return Tile(16, 16, 8, 1 if backward else stages)
    return Tile(16, 16 if wide or stride > 128 else 32, 4, stages, registers=MOST_REGISTERS)


def attention_part(block_d: int) -> int:
    """Dimensions of a query-key product at a time: all while a row tile fits in registers."""
    return block_d if block_d <= LARGEST_REGISTER_DIM else 64


def candidate_tile(dtype: torch.dtype, block_d: int, device: torch.device) -> Tile:
    """Attention for each candidate, with R in registers: block_m candidates by block_n history
    rows. Five tiles of block_m rows are held at a time: up to 256 dimensions of 16 bits they fit;
    larger ones spill."""
    if interpreted():
        return Tile(16, 16, 4, 1)
    # Blocks that are loaded ahead take memory: with several heads, 256 dimensions of float32 and
    # tf32 products need 112 KiB, and 80 without.
    tight = dtype == torch.float32 and block_d > 128 and shared_memory(device) < _LARGE
    stages = 1 if dot_precision(dtype) == "ieee" or block_d > 256 or tight else 2
    return Tile(16, 16, 8, stages, registers=MOST_REGISTERS)


# Attention for each candidate, pages whose history is one block: 32 rows of it, or 16 for each of
# 2 to 4 heads. In fewer dimensions rows cancel too often for lengths that come from products.
LEAST_LANES_DIM = 32
NO_LANES = Tile(16, 0, 4, 1)


def candidate_lanes(dtype: torch.dtype, block_d: int, heads: int, device: torch.device) -> Tile:
    """block_m candidates by a block of block_n history rows for each head, as lanes side by side;
    block_n is 0 where there is no such tile: float32 products that are exact are no faster so, and
    what is left out does not fit into shared memory."""
    exact = dtype == torch.float32 and dot_precision(dtype) == "ieee"
    if block_d < LEAST_LANES_DIM or heads > 4:
        return NO_LANES
    rows = 32 if heads == 1 else 16
    if interpreted():
        return Tile(16, rows, 4, 1)
    if exact:
        return NO_LANES
    lanes, there = next_power_of_2(heads) * rows, shared_memory(device)
    large = there >= 227 * 1024
    if block_d > LARGEST_REGISTER_DIM or dtype == torch.float32 or lanes > 32:
        if not large or (lanes > 32 and (block_d > LARGEST_REGISTER_DIM or dtype.itemsize > 2)):
            return NO_LANES
    if block_d > LARGEST_REGISTER_DIM:
        if dtype != torch.bfloat16:
            return NO_LANES
        size = 32 if block_d == 512 else 16
        return Tile(size, size, 8, 1, registers=MOST_REGISTERS)
    block_m = 32 if dtype == torch.float32 or there < _LARGE else 64
    ahead = large and dtype == torch.bfloat16 and lanes == 32
    return Tile(block_m, rows, 4, 2 if ahead else 1, registers=MOST_REGISTERS)


@dataclass(frozen=True)
class BinnedTile(Tile):
    """block_k dimensions of a product of rows at a time."""

    block_k: int = 0


def binned_tile(kind: str, dtype: torch.dtype, block_d: int, device: torch.device) -> BinnedTile:
    """Attention for each candidate by products alone: block_m candidates by a bin of 64 history
    rows; `kind` is "scores" or "gradients"."""
    if interpreted():
        return BinnedTile(16, 64, 4, 1, block_k=min(block_d, 256))
    if dtype == torch.float32:
        stages = 1 if dot_precision(dtype) == "ieee" else 2
        return BinnedTile(64, 64, 8, stages, registers=MOST_REGISTERS, block_k=16)
    rows, warps, wide = 128, 8, block_d if block_d <= LARGEST_REGISTER_DIM else 64
    if dtype == torch.float16:
        wide = min(wide, 64)  # its weights and gradients are float32: twice the memory
    if capability(device) in (100, 103):
        rows = 64
    elif shared_memory(device) < _LARGE and (wide > 128 or dtype == torch.float16):
        # 137 KiB, and 105 of float16, are too much. Half as many warps: on 64 rows 8 would do
        # everything twice.
        rows, warps = 64, 4
    return BinnedTile(rows, 64, warps, 2, registers=MOST_REGISTERS, block_k=wide)


def binned_products(dtype: torch.dtype, block_d: int, device: torch.device) -> ProductTile:
    """The products with dL/dx: block_m history rows or a "gradients" tile of candidates, block_n
    dimensions, block_k candidates at a time."""
    if interpreted():
        return ProductTile(128, min(block_d, 256), 4, 1, block_k=128)
    if dtype == torch.float32:
        return ProductTile(64, min(block_d, 64), 4, 1, block_k=16)
    # Elsewhere operands are in registers, too: beside them a sum of 256 columns spills 256 bytes.
    columns = 256 if capability(device) in (90, 100, 103) else 128
    return ProductTile(128, min(block_d, columns), 8, 3, block_k=64)


def rows_tile(stride: int) -> Tile:
    """Memory-bound kernels: a few rows, enough bytes a thread."""
    return Tile(max(4, min(16, 4096 // next_power_of_2(stride))), 1, 4, 1)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's setting; 16-bit inputs have only one way."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


@dataclass(frozen=True)
class ProductTile(Tile):
    """A tile of a plain matrix product; block_k is the depth of one step."""

    block_k: int = 64


def product_tile(dtype: torch.dtype) -> ProductTile:
    """The chunked path. Not yet measured: 128 x 128 fills wgmma, with room for three stages."""
    if interpreted():
        return ProductTile(32, 32, 4, 1, block_k=32)
    if dtype != torch.float32:
        return ProductTile(128, 128, 8, 3, block_k=64)
    return (
        ProductTile(64, 64, 4, 2, registers=128, block_k=16)
        if dot_precision(dtype) == "ieee"
        else ProductTile(128, 128, 8, 3, block_k=32)
    )


def chunk_rows(columns: int, dtype: torch.dtype, workspace: int, tile: ProductTile) -> int:
    """Rows of P, and of the sums of its column tiles, that fit into so many bytes."""
    row = columns * dtype.itemsize + -(-columns // tile.block_n) * 12
    return max(workspace // row // tile.block_m, 1) * tile.block_m


def use_chunks(dtype: torch.dtype, dim: int) -> bool:
    """Whether the contrast goes in chunks with P stored: the accumulator would spill (measured at
    D = 512), or products are exact float32, whose operands a thread would hold over all of D."""
    exact = dtype == torch.float32 and dot_precision(dtype) == "ieee"
    return dim > LARGEST_REGISTER_DIM or (exact and not interpreted())

"""Tile choices, in one place. The numbers behind them are in README.md."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, warps, and software pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Rows per program of the bookkeeping kernels, and of the memory-bound ones.
BLOCK_PLAN = 1024
LARGEST_REGISTER_DIM = 256  # above it the accumulator spills: the chunked path takes over
LARGEST_DIM = 1024
# Row strides at which the fused prologue was measured to be faster: none was measured yet.
FUSED_STRIDES: frozenset[int] = frozenset()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def next_power_of_2(n: int) -> int:
    return 1 << max(int(n) - 1, 0).bit_length()


def block_dim(dim: int) -> int:
    """The embedding dimension in registers: a power of two, at least what a matrix instruction takes."""
    return max(16, next_power_of_2(dim))


def row_stride(dim: int, chunked: bool) -> int:
    """Row length of the normalised buffers: padded with zeros, so that the inner loops need no mask over D."""
    return -(-dim // 64) * 64 if chunked else block_dim(dim)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device) -> int:
    """How many programs fill the device once: few row tiles are split along their columns up to that."""
    return _processors(device) if device.type == "cuda" else 4


def contrast_tile(
    dtype: torch.dtype, stride: int, fused: bool = False, sequence_ids: bool = False
) -> Tile:
    """The streaming pass. 16-bit rows: the fastest measured on an H100 (README.md); float32 rows: what fits.

    The tile is smaller with the attention in the prologue, whose accumulator must fit beside, and with the click
    sequence's masks by id, page and place.
    """
    if interpreted():
        return Tile(32, 32, 4, 1)
    if dtype == torch.float32:
        return Tile(64, 32, 8, 2) if stride > 64 else Tile(64, 32, 4, 2)
    if stride > 128:
        if sequence_ids:
            return Tile(128, 32, 8, 3)
        return Tile(64, 64, 8, 3) if fused else Tile(128, 64, 8, 3)
    if stride > 64:
        return Tile(64, 64, 4, 2) if fused else Tile(64, 128, 4, 2)
    return Tile(64, 64, 4, 2)


def attention_tile(dtype: torch.dtype, stride: int, heads: int, backward: bool) -> Tile:
    """Attention over short histories: block_m PV rows by block_n history rows."""
    if stride > 256:
        return Tile(16, 16, 8, 1)
    # The backward's products run in float32 unless the rows are bfloat16 (pipeline.py); heads take masked copies.
    wide = dtype == torch.float32 or (backward and (dtype == torch.float16 or heads > 1))
    if wide:
        return Tile(16, 16, 4, 1)
    return Tile(16, 16, 4, 2) if stride > 128 else Tile(16, 32, 4, 2)


def attention_part(block_d: int) -> int:
    """Dimensions of a query-key product taken at a time: all of them while a row tile fits in registers."""
    return block_d if block_d <= LARGEST_REGISTER_DIM else 64


def rows_tile(stride: int) -> Tile:
    """Memory-bound kernels: a few rows, enough bytes a thread."""
    return Tile(max(4, min(16, 4096 // next_power_of_2(stride))), 1, 4, 1)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's setting; 16-bit inputs have only one way."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def fuse_attention(stride: int, chunked: bool, both_lists: bool, heads: int) -> bool:
    """Whether the attention runs in the prologue of the contrast's row tile, so that R does not travel through memory.

    It can where every row of the pass is an anchor. Where it pays is a measured table; it has no entry yet, so the
    separate kernel is used (README.md).
    """
    return not chunked and not both_lists and heads == 1 and stride in FUSED_STRIDES


@dataclass(frozen=True)
class ProductTile(Tile):
    """A tile of a plain matrix product; block_k is the depth of one step."""

    block_k: int


def product_tile(dtype: torch.dtype) -> ProductTile:
    """The chunked path. Not yet measured: 128 x 128 is what wgmma fills, with room for three stages."""
    if interpreted():
        return ProductTile(32, 32, 4, 1, 32)
    if dtype != torch.float32:
        return ProductTile(128, 128, 8, 3, 64)
    return (
        ProductTile(64, 64, 4, 2, 16)
        if dot_precision(dtype) == "ieee"
        else ProductTile(128, 128, 8, 3, 32)
    )


def chunk_rows(columns: int, dtype: torch.dtype, workspace: int, tile: ProductTile) -> int:
    """Rows of P, and of the sums of its column tiles, that fit into a workspace of so many bytes."""
    row = columns * dtype.itemsize + -(-columns // tile.block_n) * 12
    return max(workspace // row // tile.block_m, 1) * tile.block_m


def use_chunks(dtype: torch.dtype, dim: int) -> bool:
    """Whether the contrast goes in chunks with P stored: the accumulator would spill (measured at D = 512), or the
    products are exact float32, whose operands a thread would hold over all of D."""
    exact = dtype == torch.float32 and dot_precision(dtype) == "ieee"
    return dim > LARGEST_REGISTER_DIM or (exact and not interpreted())

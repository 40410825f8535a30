"""Which candidates a row has, by name: for kernels and for those who launch them."""

from __future__ import annotations

import triton
import triton.language as tl

# The positive is always apart.
MASK_BATCH = tl.constexpr(0)
MASK_PAGE = tl.constexpr(1)
MASK_OTHER_PAGES = tl.constexpr(2)
MASK_SEQUENCE = tl.constexpr(3)
MASK_SEQUENCE_IDS = tl.constexpr(4)

# "sequence": the rows are a click sequence's own columns; without ids each is another item.
MASKS = {
    "batch": MASK_BATCH.value,
    "page": MASK_PAGE.value,
    "other_pages": MASK_OTHER_PAGES.value,
    "sequence": MASK_SEQUENCE.value,
    "sequence ids": MASK_SEQUENCE_IDS.value,
}


@triton.jit
def candidate_mask(x_id, y_id, x_page, y_page, x_place, y_place, MASK: tl.constexpr):
    """Pairs [BLOCK_M, BLOCK_N] whose exp(s) counts. An item with the id of the row's item, itself
    included, does not; in the click sequence only the row itself and its id's re-occurrences on
    other pages do not."""
    allowed = x_id[:, None] != y_id[None, :]
    if MASK == MASK_SEQUENCE_IDS:
        itself = x_place[:, None] == y_place[None, :]
        allowed = allowed | ((x_page[:, None] == y_page[None, :]) & (itself == 0))
    elif MASK == MASK_PAGE:
        allowed = allowed & (x_page[:, None] == y_page[None, :])
    elif MASK == MASK_OTHER_PAGES:
        allowed = allowed & (x_page[:, None] != y_page[None, :])
    return allowed

"""What the losses' options may be: once for calls, modules and the trainer's settings. Without
torch, which nobody waits for who asks for help."""

from __future__ import annotations

from typing import Literal, get_args

Attends = Literal["candidate", "anchor", "mean"]
Negatives = Literal["batch", "page", "other_pages"]
Direction = Literal["reconstruct", "identify", "both"]
Reduction = Literal["mean", "sum", "none"]
Exchange = Literal["auto", "gather", "ring"]

CHOICES: dict[str, tuple[str, ...]] = {
    "attention": get_args(Attends),
    "negatives": get_args(Negatives),
    "direction": get_args(Direction),
    "reduction": get_args(Reduction),
    "exchange": get_args(Exchange),
}

WORKSPACE = 1 << 30  # bytes

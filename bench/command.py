"""What the commands share: parser, line about the machine, JSON of what was measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parser_of(module: str, text: str | None) -> argparse.ArgumentParser:
    """Of `python -m module`, with the module's docstring as its help."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def line_of(surroundings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in surroundings.items() if v is not None)


def write_json(path: Path | None, result: Any) -> None:
    """Where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")

"""Every test that README.md names for a promise is there, and no section of docs/loss.md is left
out."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README)
    assert len(named) > 100
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not re.search(rf"^def {test}\(", (HERE / file).read_text(), re.MULTILINE)
    ]
    assert not missing


def test_every_section_of_the_loss_has_tests() -> None:
    headings = re.findall(r"^## (.*)", (HERE.parent / "docs/loss.md").read_text(), re.MULTILINE)
    anchors = {x.lower().replace(" ", "-") for x in headings}
    assert anchors == set(re.findall(r"\(\.\./docs/loss\.md#([\w-]+)\)", README))

"""pytest bench: what is timed runs alone, whatever pyproject.toml says of workers."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if hasattr(config.option, "numprocesses"):
        config.option.numprocesses, config.option.dist = 0, "no"

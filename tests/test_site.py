"""The documentation site: every page has its place, and nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import courier_fast

ROOT = Path(__file__).parent.parent
NAV = (ROOT / "mkdocs.yml").read_text().split("nav:")[1].split("theme:")[0]


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^\s*- .*: (\S+\.md)$", NAV, re.MULTILINE)
    assert all((ROOT / page).is_file() for page in listed)
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(listed)


def test_every_public_name_is_described() -> None:
    described = re.findall(
        r"^::: courier_fast\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE
    )
    assert set(courier_fast.__all__) <= set(described)


class Loaded(HTMLParser):
    """Addresses that a browser loads by itself, and not at a click."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = ("src", "srcset", "data", "poster") + (("href",) if tag in ("link", "use") else ())
        if tag != "link" or given.get("rel") not in ("canonical", "next", "prev"):
            self.found += [value for name in names if (value := given.get(name))]


def elsewhere(text: str) -> list[str]:
    page = Loaded()
    page.feed(text)
    return [address for address in page.found if re.match(r"(\w+:)?//", address)]


def test_what_is_loaded_is_seen() -> None:
    assert elsewhere('<link rel="stylesheet" href="https://fonts.example/a.css">')
    assert elsewhere('<script src="//cdn.example/a.js"></script>')
    assert elsewhere('<p><img alt="x" src="http://x.example/a.png"></p>')
    assert not elsewhere('<a href="https://arxiv.org">x</a><img src="a.png"><link href="b.css">')


def test_the_site_is_built_strictly_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", exc_type=ImportError)
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 10
    assert {str(p): elsewhere(p.read_text()) for p in pages if elsewhere(p.read_text())} == {}
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(\w+:)?//", style.read_text()), style
    api = (tmp_path / "site/docs/api.html").read_text()
    for name in courier_fast.__all__:
        assert f'id="courier_fast.{name}"' in api
    assert "logsumexp_{j in cand(i)}" in api  # the equation of the docstring

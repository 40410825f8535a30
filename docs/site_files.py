"""A hook of MkDocs: the site has the pages of mkdocs.yml and what they link to, each at its place
in the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def pages_of(nav: Any) -> list[str]:
    """The files that a nav names."""
    if isinstance(nav, str):
        return [nav]
    return [
        page
        for entry in (nav.values() if isinstance(nav, dict) else nav)
        for page in pages_of(entry)
    ]


def reached(root: Path, pages: list[str]) -> list[str]:
    """The pages and all files of the repository that they link to, directly or through others."""
    found: dict[str, None] = {}
    waiting = list(pages)
    while waiting:
        name = waiting.pop()
        if name in found or not (root / name).is_file():
            continue
        found[name] = None
        if name.endswith(".md"):
            targets = LINK.findall((root / name).read_text())
            waiting += [
                posixpath.normpath(posixpath.join(posixpath.dirname(name), t))
                for t in targets
                if ":" not in t
            ]
    return sorted(found)


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for name in reached(root, [*pages_of(config.nav), *config.extra_css]):
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files

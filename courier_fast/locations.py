"""Paths and URLs as they are given: on the command line, in settings, to functions."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from urllib.parse import unquote

Location = str | Path
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


class LocationError(ValueError, argparse.ArgumentTypeError):
    """A path or URL that cannot be meant; argparse shows its text."""


def location(path: str | os.PathLike[str]) -> Location:
    """A URL as text without a slash at its end, anything else as a path: of a file:// URL the local
    one, ~ and ~user as the shell reads them.

    Raises LocationError (a ValueError) for a file URL of another host or without a whole path, a
    home that is not there, an empty text.
    """
    text = os.fspath(path)
    if not text.strip():
        raise LocationError("expected a path, got an empty text")
    if "\0" in text:
        raise LocationError(f"expected a path, got one with a zero byte: {text!r}")
    if text[:5].lower() == "file:" and not os.path.lexists(text):
        return _of_file_url(text)
    if is_url(text):
        scheme, rest = text.split("://", 1)
        if not rest.strip("/"):
            raise LocationError(f"expected a URL with a name after {scheme}://, got {text}")
        return text.rstrip("/")
    if text.startswith("~") and not os.path.lexists(text):
        home = os.path.expanduser(text)
        if home.startswith("~"):
            raise LocationError(
                f"expected a path, got {text}: there is no home of {text.split('/')[0]}; ./{text} "
                "for a name that begins so"
            )
        return Path(home)
    return Path(text)


def local_path(path: str | os.PathLike[str]) -> Path:
    """As `location`, where only a local path will do. LocationError for a URL of another kind: as a
    path it would be a folder called "s3:"."""
    found = location(path)
    if not isinstance(found, Path):
        raise LocationError(f"expected a local path, got {found}")
    return found


def _of_file_url(url: str) -> Path:
    """The local path of a file URL (RFC 8089): file:///a%20b, file://localhost/a, file:/a."""
    rest = url[5:]
    host = ""
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        rest = slash + path
    if host.lower() not in ("", "localhost"):
        raise LocationError(
            f"expected file:///path, a file of this machine, got {url}, of the host {host!r}"
        )
    if not rest.startswith("/"):
        raise LocationError(f"expected file:///path with a whole path, got {url}")
    found = unquote(rest, errors="surrogateescape")
    if "\0" in found:
        raise LocationError(f"expected file:///path, got one with a zero byte: {url!r}")
    # What was written by hand is not encoded: a file that is called so counts.
    return Path(rest) if os.path.lexists(rest) and not os.path.lexists(found) else Path(found)

"""The files that ship beside this package and go into guests, as they are or as lists."""

from __future__ import annotations

from pathlib import Path

FILES = Path(__file__).parent / "files"


def text(name: str) -> str:
    """A file's text."""
    return (FILES / name).read_text(encoding="utf-8")


def words(name: str) -> list[str]:
    """The words of a list file: any number on a line; what follows a # is for people."""
    return [word for line in text(name).splitlines() for word in line.partition("#")[0].split()]

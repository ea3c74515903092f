"""What a VM boots: images by name, made or fetched when they are first asked for, then kept in the cache.

    pocket    a small Linux in memory, built from packages in seconds (pocket.py)
    debian    a full Debian with systemd on a disk of its own (debian.py)
    others    cloud images from the catalogue (cloud.py)

`get("pocket")` gives an `Image`; `names()` and `describe()` list what there is; `prune()` makes room.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from labkit.errors import NotFound
from labkit.guests import debian, pocket
from labkit.guests.image import Image
from labkit.guests.store import Store
from labkit.progress import Progress, progress

__all__ = ["Entry", "Image", "describe", "get", "names", "prune"]


class _Plan(Protocol):
    @property
    def inputs(self) -> Mapping[str, str]: ...


class _Recipe(Protocol):
    """How an image comes about; the modules `pocket` and `debian` are such, and the catalogue's entries."""

    @property
    def NAME(self) -> str: ...  # noqa: N802  # a module's constant

    @property
    def WHAT(self) -> str: ...  # noqa: N802

    def recipe(self) -> str: ...

    def plan(self) -> Any: ...

    def build(self, directory: Path, plan: Any, progress: Progress) -> Image: ...


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue.

    Attributes:
        name: as in `VMSpec.image`.
        what: what it is, for people.
        cached: True where it is ready on this computer.
        size: bytes that it takes in the cache; 0 where it is not there.
        version: what it was made from; "" where it is not there.
    """

    name: str
    what: str
    cached: bool
    size: int
    version: str


def get(name: str, *, refresh: bool = False) -> Image:
    """The image of that name, made or fetched first where it is not there yet.

    Arguments:
        name: one of `names()`.
        refresh: look for newer packages too, and make the image anew where there are. Without it, an image
            that is there is taken as it is, for a few milliseconds' work.

    Raises:
        NotFound: there is no such image.
        HostError: this computer lacks something that making it takes.
        ToolError, DownloadError: making or fetching it failed.
    """
    recipe = _recipe(name)
    store = Store(name)
    wanted = recipe.recipe()
    record = store.current(wanted)
    if record and not refresh:
        return record.image
    with progress(f"Making the {name} guest") as shown, store.locked(shown):
        before, record = record, store.current(wanted)  # another process may have made it while we waited
        if record and (not refresh or record != before):
            return record.image
        shown.step("looking for what it is made from")
        plan = recipe.plan()
        if record and dict(record.inputs) == dict(plan.inputs):
            return record.image
        return store.publish(wanted, plan.inputs, lambda directory: recipe.build(directory, plan, shown))


def prune(in_use: Collection[Path] = ()) -> int:
    """Remove what was built or fetched earlier and is current no more; returns the bytes that came free.

    Arguments:
        in_use: images' files that machines refer to (kernels, initial RAM disks, backing files); they stay.
    """
    freed = 0
    for recipe in _recipes():
        store = Store(recipe.NAME)
        if store.directory.exists():
            with store.locked():
                freed += store.prune(recipe.recipe(), in_use)
    return freed


def names() -> list[str]:
    """The names of all images that `get` knows, those that labkit builds first."""
    return [recipe.NAME for recipe in _recipes()]


def describe() -> list[Entry]:
    """The catalogue, in the order of `names()`; asks nobody and builds nothing."""
    return [_entry(recipe) for recipe in _recipes()]


def _entry(recipe: _Recipe) -> Entry:
    store, wanted = Store(recipe.NAME), recipe.recipe()
    record = store.current(wanted)
    version = record.image.version if record else ""
    return Entry(recipe.NAME, recipe.WHAT, record is not None, store.size(wanted), version)


#: The guests that are built here; what is downloaded is in the catalogue.
_BUILT: tuple[_Recipe, ...] = (pocket, debian)


def _recipe(name: str) -> _Recipe:
    for recipe in _BUILT:  # first, as the catalogue takes longer to read than to look up what is built
        if name == recipe.NAME:
            return recipe
    found = _catalogue().get(name)
    if found is None:
        raise _unknown(name)
    return found


def _recipes() -> list[_Recipe]:
    return [*_BUILT, *_catalogue().values()]


def _catalogue() -> Mapping[str, _Recipe]:
    from labkit.guests import cloud  # only now: it brings the YAML reader

    return cloud.catalogue()


def _unknown(name: str) -> NotFound:
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return NotFound(f"There is no image {name!r}.", mend=f"{hint}There are: {', '.join(names())}.")

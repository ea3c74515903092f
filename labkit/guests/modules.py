"""Kernel modules of a distribution's kernel: which ones are needed, in which order, and depmod's tables.

The packages carry no `modules.dep` (their post-installation script makes it), so we make our own for the
modules that we take, from what each module says of itself in its `.modinfo` section.
Source: modules.dep(5), modinfo(8), kbuild's Documentation/kbuild/modules.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from labkit.guests import elf, kernel

_COMPRESSED = (".xz", ".zst", ".gz")


@dataclass(frozen=True)
class Module:
    """One kernel module, uncompressed.

    Attributes:
        name: with underscores, as `lsmod` shows it.
        path: below /lib/modules/VERSION: "kernel/drivers/net/virtio_net.ko".
        data: the ELF file.
        depends: names of the modules that must be loaded before it.
        aliases: patterns of the devices and protocols that it serves.
    """

    name: str
    path: str
    data: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


class ModuleTree:
    """All modules of one kernel, read only as far as they are asked for.

    Arguments:
        files: path below /lib/modules/VERSION -> contents, compressed or not.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self._paths = {module_name(path): path for path in files if ".ko" in PurePosixPath(path).suffixes}
        self._read: dict[str, Module] = {}

    def __contains__(self, name: str) -> bool:
        return canonical(name) in self._paths

    def load_order(self, names: Iterable[str]) -> list[Module]:
        """The named modules and all that they depend on, each after what it needs.

        Names that this kernel has no module for are left out: what one distribution builds as a module is
        compiled into the kernel, or absent, in another.
        """
        ordered: dict[str, Module] = {}

        def visit(name: str) -> None:
            if name in ordered or name not in self._paths:
                return
            module = self._module(name)
            for dependency in module.depends:
                visit(dependency)
            ordered[name] = module

        for name in names:
            visit(canonical(name))
        return list(ordered.values())

    def _module(self, name: str) -> Module:
        if name not in self._read:
            path = self._paths[name]
            data = self._files[path]
            if path.endswith(_COMPRESSED):
                data = kernel.decompress(data)
                path = path.rpartition(".")[0]
            self._read[name] = _parse(name, path, data)
        return self._read[name]


def canonical(name: str) -> str:
    """A module's name as the kernel writes it: hyphens and underscores are the same."""
    return name.replace("-", "_")


def module_name(path: str) -> str:
    """The module's name from its file's: "kernel/a/virtio-rng.ko.xz" is "virtio_rng"."""
    return canonical(PurePosixPath(path).name.partition(".ko")[0])


def _parse(name: str, path: str, data: bytes) -> Module:
    fields = [
        entry.decode(errors="replace").partition("=")[::2]
        for entry in elf.section(data, ".modinfo").split(b"\0")
    ]
    depends = [
        canonical(word) for key, value in fields if key == "depends" for word in value.split(",") if word
    ]
    aliases = [value for key, value in fields if key == "alias"]
    return Module(name, path, data, tuple(depends), tuple(aliases))


def modules_dep(modules: list[Module]) -> str:
    """The text of modules.dep for modules in load order.

    Each line names a module's file and those of all it needs, what must be loaded first standing last.
    """
    paths = {module.name: module.path for module in modules}
    needs: dict[str, list[str]] = {}
    for module in modules:
        every: dict[str, None] = {}
        for dependency in reversed(module.depends):
            every.setdefault(dependency)
        for dependency in module.depends:
            for deeper in needs.get(dependency, []):
                every.pop(deeper, None)  # must come before all that need it, so move it to the end
                every[deeper] = None
        needs[module.name] = [name for name in every if name in paths]
    lines = [
        f"{module.path}: {' '.join(paths[name] for name in needs[module.name])}".rstrip()
        for module in modules
    ]
    return "\n".join(sorted(lines)) + "\n"


def modules_alias(modules: list[Module]) -> str:
    """The text of modules.alias: which module serves which device or protocol."""
    return "".join(sorted(f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases))

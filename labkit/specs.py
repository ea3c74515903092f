"""Pure descriptions of machines: plain data, validated, comparable, printable.

A spec does no I/O and touches nothing; a hypervisor turns it into something that runs.
Sizes are bytes, and may be written as text: "256 MiB", "1 GiB", "1.5G" (binary units).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from labkit.errors import SpecError

__all__ = ["DiskSpec", "VMSpec", "check_name", "format_size", "parse_size"]

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = {"": 1, "B": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGT]?)(?:iB|B)?\s*", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?")
_NAME_MAX = 40
_CPU_MODEL = re.compile(r"[A-Za-z0-9_.,+=-]{1,80}")

MAX_MEMORY = 4 * TiB
MIN_MEMORY = 64 * MiB
MAX_CPUS = 64
MAX_DISK = 16 * TiB
#: What a PC's 32 PCI slots hold beside the machine's own devices.
MAX_DISKS, MAX_NETWORKS = 16, 8


def parse_size(value: object) -> int:
    """Bytes from a number of bytes or from text such as "256 MiB" (units are binary: K, M, G, T).

    Raises:
        SpecError: the text is no size.
    """
    mend = 'Write a number and a unit, such as "256 MiB" or "1 GiB", or a whole number of bytes.'
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 1 << 63:
            raise SpecError(f"A size of {value.bit_length()} bits cannot be had.", mend=mend)
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise SpecError(f"{_brief(value)} is not a size.", mend=mend)
    number, unit = match[1], _UNITS[match[2].upper()]
    return int(number) * unit if number.isdigit() else int(float(number) * unit)


def format_size(size: int) -> str:
    """A size as people write it: 268435456 is "256 MiB"."""
    for unit, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B"


def check_name(name: object, what: str = "machine") -> str:
    """The name, if it may become a host name, a file name and a part of XML.

    Letters, digits and inner hyphens, at most 40 of them (RFC 1123's label, shortened so that
    paths of sockets stay within the kernel's limit).

    Raises:
        SpecError: it may not.
    """
    rule = f"Use 1 to {_NAME_MAX} letters, digits and hyphens, such as web-1, with no hyphen at either end."
    if not isinstance(name, str):
        raise SpecError(f"The name of a {what} is text, not {_brief(name)}.", mend=rule)
    if not name:
        raise SpecError(f"The name of a {what} cannot be empty.", mend=rule)
    if len(name) > _NAME_MAX:
        raise SpecError(f"The {what} name {name[:20]!r}… has {len(name)} characters.", mend=rule)
    if not _NAME.fullmatch(name):
        raise SpecError(f"{name!r} cannot be the name of a {what}.", mend=rule)
    return name


def _bounded(low: int, high: int, what: str) -> AfterValidator:
    def check(size: int) -> int:
        if not low <= size <= high:
            raise SpecError(
                f"{format_size(size) if size >= 0 else size} of {what} cannot be had.",
                mend=f"Ask for {format_size(low)} to {format_size(high)}.",
            )
        return size

    return AfterValidator(check)


def _cpus(count: object) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_CPUS:
        raise SpecError(f"{_brief(count)} is not a number of CPUs.", mend=f"Ask for 1 to {MAX_CPUS}.")
    return count


def _cpu_model(model: object) -> object:
    if model is None or (isinstance(model, str) and _CPU_MODEL.fullmatch(model)):
        return model
    raise SpecError(
        f"{_brief(model)} cannot be a CPU model.",
        mend="qemu-system-x86_64 -cpu help lists those that there are.",
    )


def _at_most(count: int, what: str) -> BeforeValidator:
    def check(given: object) -> object:
        if not isinstance(given, list | tuple):
            raise SpecError(f"The {what} are a list, not {_brief(given)}.", mend=f"Write {what}=[…].")
        if len(given) > count:
            raise SpecError(f"A machine cannot have {len(given)} {what}.", mend=f"Ask for at most {count}.")
        return given

    return BeforeValidator(check)


def _brief(value: object, limit: int = 60) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer too long to be printed
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}…"


Name = Annotated[str, BeforeValidator(check_name)]
Memory = Annotated[int, BeforeValidator(parse_size), _bounded(MIN_MEMORY, MAX_MEMORY, "memory")]
DiskSize = Annotated[int, BeforeValidator(parse_size), _bounded(MiB, MAX_DISK, "disk")]
Cpus = Annotated[int, BeforeValidator(_cpus)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as exc:
            raise _spec_error(type(self).__name__, exc) from None

    def differences(self, other: Self) -> dict[str, tuple[object, object]]:
        """The fields in which two specs differ: name -> (mine, other's)."""
        mine, theirs = self.model_dump(), other.model_dump()
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


def _spec_error(kind: str, exc: pydantic.ValidationError) -> SpecError:
    """One sentence from pydantic's report: our own error where a validator of ours raised it."""
    first = exc.errors()[0]
    context = first.get("ctx", {})
    inner = context.get("error")
    if isinstance(inner, SpecError):
        return inner
    field = ".".join(str(part) for part in first["loc"]) or kind
    given = _brief(first.get("input"))
    match first["type"]:
        case "literal_error":
            return SpecError(f"{given} is no {field}.", mend=f"Choose {context['expected']}.")
        case "missing":
            return SpecError(f"{kind} needs a {field}.", mend=f"Say {field}=….")
        case "extra_forbidden":
            fields = list((VMSpec if kind == "VMSpec" else DiskSpec).model_fields)
            close = difflib.get_close_matches(field, fields, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            return SpecError(f"{kind} has no field {field}.", mend=f"{hint}There are: {', '.join(fields)}.")
    return SpecError(f"{given} cannot be the {field}: {first['msg']}.", mend=f"See help(labkit.{kind}).")


class DiskSpec(_Spec):
    """A disk: its size in bytes, and what is on it at first.

    `filesystem="ext4"` gives a disk that is ready to be mounted; None an empty one.
    """

    size: DiskSize
    filesystem: Literal["ext4"] | None = None
    format: Literal["qcow2", "raw"] = "qcow2"


class VMSpec(_Spec):
    """A virtual machine, before it exists.

    Attributes:
        name: letters, digits and hyphens; becomes the guest's host name.
        image: what it boots: "pocket", "debian", or a name from `labkit images`.
        memory, max_memory: bytes at start, and the most that it can be resized to while it runs.
        cpus, max_cpus: likewise for virtual CPUs.
        disks: the disks, the first being the system's where the image boots from one.
        boot: "kernel" enters the image's kernel directly, "disk" goes through firmware and bootloader.
        firmware: "bios" (SeaBIOS) or "uefi" (OVMF).
        accelerator: "auto" takes KVM where it was proven to work here, else TCG.
        cpu: a QEMU CPU model, or None for the accelerator's usual one.
        networks: names of the lab's networks, one network card each.
    """

    name: Name
    image: str = "pocket"
    memory: Memory = 256 * MiB
    max_memory: Memory | None = None
    cpus: Cpus = 1
    max_cpus: Cpus | None = None
    disks: Annotated[tuple[DiskSpec, ...], _at_most(MAX_DISKS, "disks")] = ()
    boot: Literal["kernel", "disk"] = "kernel"
    firmware: Literal["bios", "uefi"] = "bios"
    machine: Literal["pc", "q35", "virt"] = "pc"
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    cpu: Annotated[str | None, BeforeValidator(_cpu_model)] = None
    networks: Annotated[tuple[Name, ...], _at_most(MAX_NETWORKS, "networks")] = ()

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for field, top in (("memory", "max_memory"), ("cpus", "max_cpus")):
            most = getattr(self, top)
            if most is not None and most < getattr(self, field):
                raise SpecError(f"{top} is less than {field}.", mend=f"Raise {top}, or leave it out.")
        return self

    def describe(self) -> str:
        """One line for people: `web: pocket, 1 CPU, 256 MiB, disks 1 GiB`."""
        parts = [self.image, f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}", format_size(self.memory)]
        if self.disks:
            parts.append("disks " + " + ".join(format_size(disk.size) for disk in self.disks))
        if self.networks:
            parts.append("on " + ", ".join(self.networks))
        return f"{self.name}: {', '.join(parts)}"


def load_vm(data: Mapping[str, Any]) -> VMSpec:
    """A spec from plain data, as JSON or YAML hold it.

    Raises:
        SpecError: the data describes no machine.
    """
    return VMSpec(**data)

"""Cloud images: what distributions publish, fetched and checked, and the seed that makes a machine of one.

The catalogue is `files/catalogue.yaml`; a file of the same form that `LABKIT_CATALOGUE` names, or
`images.yaml` in the user's configuration directory, adds to it.
Sources: https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from labkit import paths
from labkit.errors import DownloadError, HostError, SpecError
from labkit.guests import data
from labkit.guests.agent_build import build_agent
from labkit.guests.download import check_form, download_path, fetch, resolve_checksum
from labkit.guests.image import Image
from labkit.guests.initramfs import CONSOLES
from labkit.guests.store import fingerprint
from labkit.progress import Progress
from labkit.specs import check_name, parse_size
from labkit.tools import require, run_tool

#: Names that labkit's own guests have.
RESERVED = ("pocket", "debian")

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


def _checksum(value: str) -> str:
    if "/" not in value and not check_form(value):
        raise ValueError('a checksum is "sha256:…", "sha512:…", or where a list of them is')
    return value


class Source(BaseModel):
    """Where an image of one architecture comes from, and what it must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, Field(min_length=1)]
    checksum: Annotated[str, AfterValidator(_checksum)] | None = None


class CloudImage(BaseModel):
    """One entry of the catalogue; sizes are bytes, written as in `DiskSpec`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    images: Annotated[dict[Literal["x86_64", "aarch64"], Source], Field(min_length=1)]
    memory: Annotated[int, BeforeValidator(parse_size)]
    disk: Annotated[int, BeforeValidator(parse_size)]
    firmware: Annotated[tuple[Literal["bios", "uefi"], ...], Field(min_length=1)] = ("bios",)
    channel: Literal["labkit", "agent", "none"] = "labkit"
    cloud_init: bool = True


def catalogue() -> dict[str, CloudRecipe]:
    """All cloud images by name: labkit's, then the user's, which may replace them.

    Raises:
        SpecError: a catalogue is not as it should be; names the file and the field.
    """
    entries = _read(data.FILES / "catalogue.yaml")
    for path in _user_files():
        entries.update(_read(path))
    return {name: CloudRecipe(name, entry) for name, entry in entries.items()}


def _user_files() -> list[Path]:
    home = paths.home()
    usual = (home or platformdirs.user_config_path("labkit")) / "images.yaml"
    named = os.environ.get("LABKIT_CATALOGUE")
    return [*([usual] if usual.exists() else []), *([Path(named)] if named else [])]


def _read(path: Path) -> dict[str, CloudImage]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise SpecError(f"The image catalogue {path} cannot be read.", evidence=str(exc)) from exc
    if not isinstance(content, dict):
        raise SpecError(f"The image catalogue {path} is not a list of names with their images.")
    return {_name(path, name): _entry(path, name, entry) for name, entry in content.items()}


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in RESERVED:
        raise SpecError(
            f"{name!r} in {path} cannot be the name of an image.",
            mend=f"Use lower-case letters, digits, dots and hyphens, and none of: {', '.join(RESERVED)}.",
        )
    return name


def _entry(path: Path, name: str, entry: object) -> CloudImage:
    try:
        return CloudImage.model_validate(entry)
    except (pydantic.ValidationError, SpecError) as exc:
        raise SpecError(f"The image {name!r} in {path} is not described right.", evidence=str(exc)) from exc


@dataclass(frozen=True)
class Plan:
    """What is to be fetched: where from, and the checksum as it is published today."""

    arch: str
    source: str
    checksum: str | None

    @property
    def inputs(self) -> dict[str, str]:
        """What tells one version of the image from another."""
        return {self.source: self.checksum or ""}


@dataclass(frozen=True)
class CloudRecipe:
    """How one image of the catalogue comes onto this computer."""

    name: str
    entry: CloudImage

    @property
    def NAME(self) -> str:  # noqa: N802  # as the modules pocket and debian name theirs
        """The image's name."""
        return self.name

    @property
    def WHAT(self) -> str:  # noqa: N802
        """What it is, for people."""
        return self.entry.what

    def recipe(self) -> str:
        """The fingerprint of the catalogue's entry."""
        return fingerprint([], self.entry.model_dump_json())

    def plan(self) -> Plan:
        """Where the image comes from; asks the project for its checksum where that is not pinned.

        Raises:
            HostError: there is none for this computer's architecture.
            DownloadError: the checksum could not be had.
        """
        arch = os.uname().machine
        source = next((source for key, source in self.entry.images.items() if key == arch), None)
        if source is None:
            raise HostError(
                f"There is no {self.name} image for {arch} computers.",
                mend=f"It exists for: {', '.join(self.entry.images)}.",
            )
        checksum = resolve_checksum(source.source, source.checksum) if source.checksum else None
        return Plan(arch, source.source, checksum)

    def build(self, directory: Path, plan: Plan, progress: Progress) -> Image:
        """Fetch the image into a directory, as a qcow2 without a backing file.

        Raises:
            DownloadError: it could not be had, or is not what it should be.
        """
        arrived = download_path(paths.cache_dir(), plan.source)
        fetch(plan.source, arrived, checksum=plan.checksum, progress=progress)
        progress.step("looking at the image")
        disk = directory / "disk.qcow2"
        virtual_size = _take(arrived, disk)
        return Image(
            name=self.name,
            version=f"{self.entry.what}, {(plan.checksum or 'unchecked')[:19]}",
            arch=plan.arch,
            disk=disk,
            console=CONSOLES[plan.arch],
            channel=self.entry.channel,
            memory=self.entry.memory,
            disk_size=max(self.entry.disk, virtual_size),
            boots=("disk",),
            firmware=self.entry.firmware if plan.arch == "x86_64" else ("uefi",),
            cloud_init=self.entry.cloud_init,
            up=600.0,
        )


def _take(arrived: Path, disk: Path) -> int:
    """Move a downloaded image to its place, as a qcow2; returns its virtual size in bytes."""
    qemu_img = require("qemu-img", package="qemu-utils")
    argv = [qemu_img, "info", "--output=json", str(arrived)]
    info: dict[str, Any] = json.loads(run_tool(argv, what="look at the image"))
    if info.get("backing-filename") or info.get("format-specific", {}).get("data", {}).get("data-file"):
        arrived.unlink()
        raise DownloadError(
            "The image refers to another file, so it is not whole. It was deleted.",
            evidence=f"{info.get('backing-filename')}",
        )
    if info["format"] == "qcow2":
        arrived.replace(disk)
    else:
        run_tool(
            [qemu_img, "convert", "-O", "qcow2", str(arrived), str(disk)], what="turn the image into a qcow2"
        )
        arrived.unlink()
    return int(info["virtual-size"])


def seed_iso(
    path: Path,
    *,
    hostname: str,
    instance_id: str,
    user: str = "learner",
    shell: str = "/bin/sh",
    ssh_keys: Sequence[str] = (),
    password: str | None = None,
    packages: Sequence[str] = (),
) -> None:
    """Write a cloud-init seed: an ISO 9660 image with the label CIDATA, to be attached as a CD or disk.

    On its first boot with it, the image takes the host name, makes the user (who may use sudo without a
    password), brings its network up by DHCP, and gets labkit's agent, which the seed brings along.

    Arguments:
        path: where the ISO goes; readable by its owner only, as it may hold a password.
        hostname: the machine's.
        instance_id: tells machines apart: cloud-init does its first-boot work once for each id.
        user: the account to be made.
        shell: the account's.
        ssh_keys: public keys that may log in as it.
        password: its password; None locks it, which leaves the keys.
        packages: to be installed from the network at first boot.

    Raises:
        SpecError: a name cannot be one.
        HostError: there is no C compiler to make the agent.
    """
    import pycdlib

    check_name(hostname, "machine")
    if not _USER.fullmatch(user):
        raise SpecError(
            f"{user!r} cannot be a user's name.", mend="Use lower-case letters, digits and hyphens."
        )
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="CIDATA")
    files = {
        "meta-data": _yaml({"instance-id": instance_id, "local-hostname": hostname}),
        "user-data": b"#cloud-config\n"
        + _yaml(_user_data(hostname, user, shell, ssh_keys, password, packages)),
        "network-config": _yaml(_network_config()),
        "labkit-agent": build_agent(),
    }
    for number, (name, content) in enumerate(files.items()):
        iso.add_fp(BytesIO(content), len(content), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    fresh = path.with_name(path.name + ".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        iso.write_fp(out)
    iso.close()
    fresh.replace(path)


def _yaml(content: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(content), sort_keys=False).encode()


def _user_data(
    hostname: str,
    user: str,
    shell: str,
    ssh_keys: Sequence[str],
    password: str | None,
    packages: Sequence[str],
) -> dict[str, Any]:
    account: dict[str, Any] = {
        "name": user,
        "shell": shell,
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
        "lock_passwd": password is None,
    }
    if password is not None:
        account["plain_text_passwd"] = password
    if ssh_keys:
        account["ssh_authorized_keys"] = list(ssh_keys)
    content: dict[str, Any] = {
        "hostname": hostname,
        "manage_etc_hosts": True,
        "users": [account],
        "ssh_pwauth": password is not None,
        "runcmd": [["/bin/sh", "-c", data.text("cloud-agent-setup")]],
    }
    if packages:
        content["packages"] = list(packages)
    return content


def _network_config() -> Mapping[str, Any]:
    """Version 2 of the format: every Ethernet card by DHCP, and nothing waits for it."""
    return {
        "version": 2,
        "ethernets": {"all": {"match": {"name": "e*"}, "dhcp4": True, "optional": True}},
    }

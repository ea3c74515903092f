"""The catalogue of cloud images, what comes of an entry, and the seed that they boot with."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pycdlib
import pytest
import yaml

from labkit import guests
from labkit.errors import DownloadError, HostError, NotFound, SpecError
from labkit.guests import cloud
from labkit.guests.download import check_form

ARCH = os.uname().machine


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and an image called "tiny" in the catalogue that this computer has as a file."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    disk = tmp_path / "tiny.raw"
    disk.write_bytes(b"boot sector".ljust(1 << 20, b"\0"))
    _catalogue(tmp_path, monkeypatch, disk, hashlib.sha256(disk.read_bytes()).hexdigest())
    return tmp_path


def _catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Path, digest: str) -> None:
    entry = {
        "what": "a tiny disk",
        "images": {ARCH: {"source": str(disk), "checksum": f"sha256:{digest}"}},
        "memory": "64 MiB",
        "disk": "1 GiB",
    }
    path = tmp_path / "images.yaml"
    path.write_text(yaml.safe_dump({"tiny": entry}))
    monkeypatch.setenv("LABKIT_CATALOGUE", str(path))


def test_the_catalogue_that_ships_is_right() -> None:
    entries = cloud.catalogue()

    assert set(entries) >= {"ubuntu-24.04", "debian-12", "fedora-43", "alpine-3.22", "cirros-0.6"}
    for recipe in entries.values():
        assert all(source.source.startswith("https://") for source in recipe.entry.images.values())
        assert all(source.checksum for source in recipe.entry.images.values())


def test_an_image_is_taken_into_the_cache_as_a_qcow2(kit: Path) -> None:
    image = guests.get("tiny")

    assert image.disk is not None
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", image.disk]))
    assert (info["format"], info["virtual-size"]) == ("qcow2", 1 << 20)
    assert (image.memory, image.disk_size) == (64 << 20, 1 << 30)
    assert image.cloud_init
    assert (kit / "tiny.raw").exists()
    assert next(entry for entry in guests.describe() if entry.name == "tiny").cached


def test_a_cached_image_does_not_need_its_source(kit: Path) -> None:
    image = guests.get("tiny")
    (kit / "tiny.raw").unlink()

    assert guests.get("tiny") == image


def test_a_changed_source_is_taken_when_asked_to_refresh(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = guests.get("tiny")
    disk = kit / "tiny.raw"
    disk.write_bytes(b"another".ljust(1 << 20, b"\0"))
    _catalogue(kit, monkeypatch, disk, hashlib.sha256(disk.read_bytes()).hexdigest())

    new = guests.get("tiny", refresh=True)

    assert old.disk is not None
    assert new.disk != old.disk
    assert old.disk.exists()
    assert guests.get("tiny", refresh=True) == new


def test_a_wrong_checksum_leaves_nothing(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _catalogue(kit, monkeypatch, kit / "tiny.raw", "0" * 64)

    with pytest.raises(DownloadError, match="not the file"):
        guests.get("tiny")

    store = kit / "cache" / "guests" / "tiny"
    assert [path.name for path in store.iterdir()] == [".lock"]
    assert list((kit / "cache" / "downloads").iterdir()) == []


def test_an_image_that_leans_on_another_file_is_refused(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = kit / "overlay.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "tiny.raw", "-F", "raw", disk]
    subprocess.run(argv, check=True, cwd=kit)
    _catalogue(kit, monkeypatch, disk, hashlib.sha256(disk.read_bytes()).hexdigest())

    with pytest.raises(DownloadError, match="refers to another file"):
        guests.get("tiny")


def test_processes_that_want_the_same_image_make_it_once(kit: Path) -> None:
    script = "from labkit import guests; print(guests.get('tiny').disk)"
    environment = {**os.environ, "LABKIT_PROGRESS": "off"}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]

    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(said)) == 1
    builds = [path for path in (kit / "cache" / "guests" / "tiny").iterdir() if path.is_dir()]
    assert len(builds) == 1


def test_an_unknown_image_is_told_with_those_that_there_are(kit: Path) -> None:
    with pytest.raises(NotFound, match="'tinny'") as caught:
        guests.get("tinny")

    assert "Did you mean 'tiny'" in caught.value.mend
    assert "pocket, debian" in caught.value.mend


@pytest.mark.parametrize("name", ["", "../x", "pocket ", "x" * 300])
def test_a_name_that_is_none_is_unknown(kit: Path, name: str) -> None:
    with pytest.raises(NotFound):
        guests.get(name)


def test_an_image_for_another_architecture_is_told(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kit / "images.yaml"
    other = "aarch64" if ARCH == "x86_64" else "x86_64"
    path.write_text(path.read_text().replace(ARCH, other))

    with pytest.raises(HostError, match=f"for {ARCH} computers"):
        guests.get("tiny")


GOOD = {"what": "x", "images": {"x86_64": {"source": "/x"}}, "memory": "1 GiB", "disk": "1 GiB"}


@pytest.mark.parametrize(
    ("content", "evidence"),
    [
        ("[1, 2]", ""),
        ("{", ""),
        (yaml.safe_dump({"pocket": GOOD}), "pocket"),
        (yaml.safe_dump({"../x": GOOD}), "lower-case"),
        (yaml.safe_dump({"x": {**GOOD, "memory": "much"}}), "much"),
        (yaml.safe_dump({"x": {**GOOD, "images": {}}}), "images"),
        (yaml.safe_dump({"x": {**GOOD, "images": {"vax": {"source": "/x"}}}}), "vax"),
        (
            yaml.safe_dump({"x": {**GOOD, "images": {"x86_64": {"source": "/x", "checksum": "0" * 64}}}}),
            "sha256",
        ),
        (yaml.safe_dump({"x": {**GOOD, "colour": "red"}}), "colour"),
    ],
)
def test_a_catalogue_that_is_wrong_is_named(
    content: str, evidence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    monkeypatch.setenv("LABKIT_CATALOGUE", str(path))

    with pytest.raises(SpecError) as caught:
        guests.names()

    assert "mine.yaml" in str(caught.value)
    assert evidence in str(caught.value)


def _read_seed(path: Path) -> dict[str, str]:
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    assert iso.pvd.volume_identifier.decode().strip() == "CIDATA"
    files = {}
    for name in ("meta-data", "user-data", "network-config", "labkit-agent"):
        for facade in (iso.get_rock_ridge_facade(), iso.get_joliet_facade()):
            out = BytesIO()
            facade.get_file_from_iso_fp(out, f"/{name}")
            files[name] = out.getvalue().decode(errors="replace")
    iso.close()
    return files


def test_a_seed_says_what_cloud_init_is_to_do(tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    key = "ssh-ed25519 AAAA learner@host"
    cloud.seed_iso(
        path, hostname="web-1", instance_id="i-1", ssh_keys=[key], password="s: 'x'", packages=["nginx"]
    )

    files = _read_seed(path)
    assert yaml.safe_load(files["meta-data"]) == {"instance-id": "i-1", "local-hostname": "web-1"}
    assert files["user-data"].startswith("#cloud-config\n")
    wanted = yaml.safe_load(files["user-data"])
    (user,) = wanted["users"]
    assert wanted["hostname"] == "web-1"
    assert (user["name"], user["plain_text_passwd"], user["lock_passwd"]) == ("learner", "s: 'x'", False)
    assert user["ssh_authorized_keys"] == [key]
    assert wanted["packages"] == ["nginx"]
    assert "labkit-agent" in wanted["runcmd"][0][2]
    assert files["labkit-agent"].startswith("\x7fELF")
    assert yaml.safe_load(files["network-config"])["version"] == 2


def test_a_seed_without_password_locks_it(tmp_path: Path) -> None:
    cloud.seed_iso(tmp_path / "seed.iso", hostname="web", instance_id="i-1")

    wanted = yaml.safe_load(_read_seed(tmp_path / "seed.iso")["user-data"])
    assert wanted["users"][0]["lock_passwd"] is True
    assert wanted["ssh_pwauth"] is False


def test_a_seed_is_for_its_owner_only(tmp_path: Path) -> None:
    cloud.seed_iso(tmp_path / "seed.iso", hostname="web", instance_id="i-1", password="secret")

    assert (tmp_path / "seed.iso").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("hostname", "user"), [("../x", "learner"), ("web", "root; rm"), ("web", "")])
def test_a_seed_takes_no_name_that_cannot_be_one(hostname: str, user: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        cloud.seed_iso(tmp_path / "seed.iso", hostname=hostname, instance_id="i-1", user=user)


def test_the_pinned_checksums_have_the_right_form() -> None:
    for recipe in cloud.catalogue().values():
        for source in recipe.entry.images.values():
            assert source.checksum
            assert source.checksum.startswith("https://") or check_form(source.checksum)

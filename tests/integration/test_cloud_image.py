"""A cloud image's whole way: fetched by HTTP, checked, seeded, booted, answering through the seed's agent.

The image is Debian with cloud-init and nothing of labkit's in it, as a distribution would publish it.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from labkit import Lab
from labkit.guests import data, debian
from labkit.progress import progress

pytestmark = [pytest.mark.qemu, pytest.mark.soak, pytest.mark.timeout(1200)]

_OURS = ("labkit-agent", "labkit-early")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the image and its checksums."""
    folder = tmp_path_factory.mktemp("published")
    words, text, root_files = data.words, data.text, debian._root_files
    with pytest.MonkeyPatch.context() as patch, progress("Making a cloud image") as shown:
        patch.setattr(debian.data, "words", lambda name: [*words(name), "cloud-init", "locales"])
        patch.setattr(
            debian.data,
            "text",
            lambda name: functools.reduce(lambda left, ours: left.replace(f" {ours}", ""), _OURS, text(name)),
        )
        patch.setattr(
            debian,
            "_root_files",
            lambda: [path for path in root_files() if not any(ours in path.name for ours in _OURS)],
        )
        patch.setattr(debian, "build_agent", lambda: b"")
        debian.build(folder, debian.plan(), shown)
    digest = hashlib.sha256((folder / "disk.qcow2").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest} *disk.qcow2\n")
    return folder


@pytest.fixture(scope="module")
def address(published: Path) -> Iterator[str]:
    """Where the folder is served."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(published))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_cloud_image_answers_without_a_network(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"source": f"{address}/disk.qcow2", "checksum": f"{address}/SHA256SUMS"}
    entry = {"what": "a test", "images": {"x86_64": source}, "memory": "512 MiB", "disk": "5 GiB"}
    catalogue = tmp_path / "images.yaml"
    catalogue.write_text(yaml.safe_dump({"published": entry}))
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LABKIT_CATALOGUE", str(catalogue))
    with Lab("cloud") as lab:
        vm = lab.vm("cumulus", image="published", cpus=2).start()
        assert vm.run("hostname").stdout == "cumulus\n"
        assert vm.run("id -un learner").stdout == "learner\n"
        vm.reset()
        assert vm.run(["systemctl", "is-enabled", "labkit-agent"]).stdout == "enabled\n"

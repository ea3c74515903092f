"""The boundary to libvirt: everything that labkit asks of it, and its errors in labkit's words."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import libvirt
import libvirt_qemu
from lxml import etree

from labkit.errors import Conflict, HostError, HypervisorError, LabkitError, NotFound, NotRunning
from labkit.hypervisors import accelerator, daemon, domain_xml
from labkit.hypervisors.hypervisor import Plan, SnapshotInfo, State
from labkit.hypervisors.streams import as_socket
from labkit.hypervisors.volumes import PoolFiles
from labkit.storage.files import Files, LocalFiles

_log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_STATES: dict[int, State] = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "running",
    libvirt.VIR_DOMAIN_SHUTDOWN: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "paused",
    libvirt.VIR_DOMAIN_SHUTOFF: "off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_NOSTATE: "off",
}

_connections: dict[str, LibvirtHypervisor] = {}
_connecting = threading.Lock()


def _quiet(_: object, error: tuple[Any, ...]) -> None:
    """libvirt prints errors on stderr, which graders and nbval take for a failure; they go to the log."""
    _log.debug("libvirt: %s", error[2])


libvirt.registerErrorHandler(_quiet, None)


def _after_fork_in_child() -> None:
    """The parent's connections are not the child's: it must neither speak on them nor say goodbye."""
    global _connecting  # noqa: PLW0603  # another thread of the parent may have held it
    _connecting = threading.Lock()
    for hypervisor in _connections.values():
        hypervisor.abandon()
    _connections.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def connect(uri: str = "") -> LibvirtHypervisor:
    """The hypervisor at a libvirt URI; labkit's own daemon where it is empty.

    Connections are kept, one for each URI and process, and made anew when they broke.

    Raises:
        HypervisorError: it cannot be reached; with libvirt's own words.
    """
    key = uri or str(daemon.socket_path())  # each LABKIT_HOME has a daemon of its own
    with _connecting:
        kept = _connections.get(key)
        if kept and kept.usable():
            return kept
        _connections[key] = LibvirtHypervisor(uri, _open(uri))
        return _connections[key]


def _open(uri: str, *, again: bool = True) -> Any:
    try:
        return libvirt.open(uri or daemon.uri())
    except libvirt.libvirtError as exc:
        if again and not uri:  # the daemon may have ended in this very moment, having been idle
            return _open(uri, again=False)
        if "Failed to find user record" in str(exc) or "Failed to find group record" in str(exc):
            raise HostError(
                "libvirt serves only users that /etc/passwd and /etc/group have an entry for.",
                evidence=str(exc),
                mend=f"As root: echo 'learner:x:{os.getuid()}:{os.getgid()}::{os.environ.get('HOME', '/')}:"
                f"/bin/sh' >> /etc/passwd; echo 'learner:x:{os.getgid()}:' >> /etc/group",
            ) from exc
        raise HypervisorError(
            "The hypervisor cannot be reached.",
            command=f"libvirt.open({uri!r})",
            evidence=str(exc),
            mend="Run labkit doctor. If LABKIT_URI is set, see whether virsh -c $LABKIT_URI list works.",
        ) from exc


def _translated(method: F) -> F:
    """libvirt's errors become labkit's, here and nowhere else."""

    @functools.wraps(method)
    def call(self: LibvirtHypervisor, uuid: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, uuid, *args, **kwargs)
        except libvirt.libvirtError as exc:
            raise _error(method.__name__, uuid, exc) from exc

    return cast(F, call)


def _error(what: str, uuid: str, exc: Any) -> LabkitError:
    match exc.get_error_code():
        case libvirt.VIR_ERR_NO_DOMAIN:
            return NotFound(
                "There is no such machine any more.", evidence=str(exc), mend="Make it: lab.vm(…)"
            )
        case libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
            return NotFound("There is no snapshot of that name.", evidence=str(exc))
        case libvirt.VIR_ERR_OPERATION_INVALID if "not running" in str(exc):
            return NotRunning("The machine is not running.", evidence=str(exc), mend="Start it: .start()")
    return HypervisorError(
        f"The hypervisor could not {what.replace('_', ' ')} the machine.",
        command=f"{what}({uuid})",
        evidence=str(exc),
    )


@contextlib.contextmanager
def _gone_meanwhile() -> Iterator[None]:
    """Another may remove a machine at any time."""
    try:
        yield
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise


class LibvirtHypervisor:
    """A libvirt connection, as the `Hypervisor` protocol has it."""

    def __init__(self, uri: str, connection: Any) -> None:
        self.uri = uri
        self.own = not uri
        self._connection = connection

    def usable(self) -> bool:
        """False where the connection broke, say because the daemon ended."""
        try:
            # isAlive alone learns of it only from a call that failed. This one takes 0.1 ms.
            return bool(self._connection.isAlive() and self._connection.getLibVersion())
        except libvirt.libvirtError:
            return False

    def abandon(self) -> None:
        """Forget the connection without a word to the daemon."""
        self._connection._o = None

    def version(self) -> tuple[str, str]:
        """The versions of libvirt and of the hypervisor: ("9.0.0", "7.2.22")."""
        return _version(self._connection.getLibVersion()), _version(self._connection.getVersion())

    def close(self) -> None:
        """Give the connection back; the daemon can end when nobody holds one."""
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()

    def define(self, plan: Plan) -> None:
        if plan.sockets:
            plan.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._connection.defineXML(domain_xml.build(plan))
        except libvirt.libvirtError as exc:
            if exc.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED and "already exists" in str(exc):
                if self.own and self._remove_stray(plan):
                    return self.define(plan)
                raise Conflict(f"A machine named {plan.domain} exists already.", evidence=str(exc)) from exc
            raise _error("define", plan.uuid, exc) from exc

    def _remove_stray(self, plan: Plan) -> bool:
        """At labkit's own daemon, a machine of the same name and lab but another identity is one that the
        ledger has lost (somebody removed its files, say)."""
        stray = self._connection.lookupByName(plan.domain).UUIDString()
        if stray == plan.uuid:
            return False
        self.remove(stray, plan.lab)
        if plan.sockets:
            shutil.rmtree(plan.sockets.with_name(stray[:8]), ignore_errors=True)
        return True

    def labelled(self) -> list[tuple[str, str, str]]:
        """The machines there that carry a lab's label: identity, name there and lab of each."""
        found = []
        try:
            for domain in self._connection.listAllDomains():
                with _gone_meanwhile():
                    if lab := domain_xml.label_of(domain.XMLDesc()):
                        found.append((domain.UUIDString(), domain.name(), lab))
        except libvirt.libvirtError as exc:
            raise _error("list", "all", exc) from exc
        return found

    def state(self, uuid: str) -> State:
        try:
            domain = self._domain(uuid)
            state, _ = domain.state()
            if state == libvirt.VIR_DOMAIN_SHUTOFF and domain.hasManagedSaveImage():
                return "saved"
        except libvirt.libvirtError as exc:
            if exc.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return "missing"
            raise _error("find", uuid, exc) from exc
        return _STATES[state]

    @_translated
    def start(self, uuid: str, *, paused: bool = False) -> None:
        try:
            self._domain(uuid).createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
        except libvirt.libvirtError:
            if self.state(uuid) != "running":  # another may have started it in the same instant
                raise

    @_translated
    def press_power(self, uuid: str) -> None:
        self._domain(uuid).shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)

    @_translated
    def destroy(self, uuid: str) -> None:
        try:
            self._domain(uuid).destroy()
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                raise

    @_translated
    def suspend(self, uuid: str) -> None:
        self._domain(uuid).suspend()

    @_translated
    def resume(self, uuid: str) -> None:
        domain = self._domain(uuid)
        if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            domain.resume()

    @_translated
    def why_paused(self, uuid: str) -> str:
        domain = self._domain(uuid)
        if domain.state() != [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]:
            return ""
        if libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE in domain.diskErrors().values():
            return "the host's disk is full"
        return "one of its disks could not be read or written on the host"

    @_translated
    def reset(self, uuid: str) -> None:
        self._domain(uuid).reset()

    def remove(self, uuid: str, lab: str) -> None:
        try:
            domain = self._domain(uuid)
        except libvirt.libvirtError as exc:
            if exc.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return
            raise _error("find", uuid, exc) from exc
        label = domain_xml.label_of(domain.XMLDesc())
        if label != lab:
            raise Conflict(
                f"The machine {domain.name()} was left alone: it does not carry this lab's label.",
                evidence=f"label: {label}, lab: {lab}",
            )
        self.destroy(uuid)
        self._undefine(uuid)

    @_translated
    def _undefine(self, uuid: str) -> None:
        self._domain(uuid).undefineFlags(
            libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        )

    @_translated
    def screenshot(self, uuid: str) -> tuple[str, bytes]:
        stream = self._connection.newStream(0)
        kind = self._domain(uuid).screenshot(stream, 0)
        pieces = bytearray()
        stream.recvAll(lambda _stream, data, _opaque: pieces.extend(data), None)
        stream.finish()
        return kind, bytes(pieces)

    @_translated
    def xml(self, uuid: str) -> str:
        text: str = self._domain(uuid).XMLDesc()
        return text

    def files(self, uuid: str, directory: Path) -> Files:
        return LocalFiles(directory) if self.own else PoolFiles(self._connection, self.uri, uuid)

    def best_accelerator(self) -> Literal["kvm", "tcg"] | None:
        """On this host what was proven by a probe guest; elsewhere what libvirt says of its host, which
        cannot be proven from here."""
        if self._connection.getURI().partition("://")[2].startswith("/"):
            return accelerator.best()
        try:
            self._connection.getDomainCapabilities(None, None, None, "kvm")
        except libvirt.libvirtError:
            return "tcg"
        return "kvm"

    def open_port(self, uuid: str, port: int, deadline: float) -> socket.socket:
        name = f"org.labkit.{port}"
        # QEMU listens before libvirt lets the machine run; the wait is for one that starts just now.
        while True:
            try:
                return self._open_local(uuid, name) if self.own else self._open_stream(uuid, name)
            except (OSError, HypervisorError) as exc:
                if time.monotonic() > deadline or self.state(uuid) not in ("running", "paused"):
                    raise NotRunning(
                        "The machine's command channel is not there.", evidence=f"{name}: {exc}"
                    ) from exc
                time.sleep(0.01)

    def _open_local(self, uuid: str, name: str) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        try:
            # Where QEMU's queue of clients is full, connect must fail (EAGAIN) rather than wait unbounded.
            client.setblocking(False)
            client.connect(str(self._channel_path(uuid, name)))
            client.setblocking(True)
        except BaseException:
            client.close()
            raise
        return client

    @_translated
    def _open_stream(self, uuid: str, name: str) -> socket.socket:
        flags = libvirt.VIR_DOMAIN_CHANNEL_FORCE
        return self._stream(uuid, lambda domain, stream: domain.openChannel(name, stream, flags))

    @_translated
    def _channel_path(self, uuid: str, name: str) -> Path:
        tree = etree.fromstring(self._domain(uuid).XMLDesc())
        for channel in tree.iterfind("devices/channel"):
            target, source = channel.find("target"), channel.find("source")
            if target is not None and target.get("name") == name and source is not None:
                return Path(source.get("path", ""))
        raise NotFound(f"The machine has no channel {name}.")

    @_translated
    def agent_call(self, uuid: str, command: str, timeout: float) -> str:
        answer: str = libvirt_qemu.qemuAgentCommand(self._domain(uuid), command, max(1, round(timeout)), 0)
        return answer

    @_translated
    def open_console(self, uuid: str) -> socket.socket:
        flags = libvirt.VIR_DOMAIN_CONSOLE_FORCE
        return self._stream(uuid, lambda domain, stream: domain.openConsole(None, stream, flags))

    @_translated
    def set_memory(self, uuid: str, size: int) -> None:
        domain = self._domain(uuid)
        domain.setMemoryFlags(size // 1024, _affect(domain))

    @_translated
    def set_cpus(self, uuid: str, count: int) -> None:
        domain = self._domain(uuid)
        domain.setVcpusFlags(count, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        # QEMU 7.2 never finishes unplugging a CPU that it emulates: libvirt gives up on it after 5 s, and the
        # next snapshot hangs for ever.
        if domain.isActive() and count > domain.vcpusFlags(libvirt.VIR_DOMAIN_AFFECT_LIVE):
            domain.setVcpusFlags(count, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    @_translated
    def resize_disk(self, uuid: str, index: int, size: int) -> None:
        self._domain(uuid).blockResize(
            domain_xml.disk_target(index), size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES
        )

    @_translated
    def snapshot(self, uuid: str, name: str, note: str) -> None:
        snapshot = etree.Element("domainsnapshot")
        etree.SubElement(snapshot, "name").text = name
        etree.SubElement(snapshot, "description").text = note
        domain = self._domain(uuid)
        made = domain.snapshotCreateXML(etree.tostring(snapshot, encoding="unicode"), 0)
        _have_cpus_from_start(domain, made)

    @_translated
    def revert(self, uuid: str, name: str) -> None:
        domain = self._domain(uuid)
        snapshot = domain.snapshotLookupByName(name)
        # FORCE: a machine that crashed or whose definition moved on is brought back all the same.
        domain.revertToSnapshot(snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE)

    @_translated
    def delete_snapshot(self, uuid: str, name: str) -> None:
        self._domain(uuid).snapshotLookupByName(name).delete()

    @_translated
    def snapshots(self, uuid: str) -> Sequence[SnapshotInfo]:
        domain = self._domain(uuid)
        listed = domain.listAllSnapshots(libvirt.VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL)
        return [_snapshot_info(snapshot) for snapshot in listed]

    def _stream(self, uuid: str, join: Callable[[Any, Any], object]) -> socket.socket:
        """A stream of the machine as a socket.

        On a connection of its own: with libvirt 9.0, a call hung for ever while another thread waited
        in a stream's recv on the same connection.
        """
        connection = _open(self.uri or daemon.uri())
        try:
            stream = connection.newStream()
            join(connection.lookupByUUIDString(uuid), stream)
        except BaseException:
            connection.close()
            raise
        return as_socket(stream, connection.close)

    def _domain(self, uuid: str) -> Any:
        return self._connection.lookupByUUIDString(uuid)


def _affect(domain: Any) -> int:
    config: int = libvirt.VIR_DOMAIN_AFFECT_CONFIG
    return config | libvirt.VIR_DOMAIN_AFFECT_LIVE if domain.isActive() else config


def _have_cpus_from_start(domain: Any, snapshot: Any) -> None:
    """Let a revert start QEMU with the CPUs that were plugged in while the machine ran.

    libvirt 9.0 would plug them in after QEMU has loaded the state, which fails for want of them.
    """
    before = snapshot.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
    tree = etree.fromstring(before)
    late = [cpu for cpu in tree.iterfind("domain/vcpus/vcpu") if cpu.get("enabled") == "yes"]
    if all(cpu.get("hotpluggable") == "no" for cpu in late):
        return
    for cpu in late:
        cpu.set("hotpluggable", "no")
        if cpu.get("order"):
            del cpu.attrib["order"]
    redefine = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    try:
        domain.snapshotCreateXML(etree.tostring(tree, encoding="unicode"), redefine)
    except libvirt.libvirtError:
        domain.snapshotCreateXML(before, redefine)


def _snapshot_info(snapshot: Any) -> SnapshotInfo:
    tree = etree.fromstring(snapshot.getXMLDesc())
    memory = tree.find("memory")
    return SnapshotInfo(
        name=snapshot.getName(),
        parent=tree.findtext("parent/name"),
        created=float(tree.findtext("creationTime", "0")),
        memory=memory is not None and memory.get("snapshot") != "no",
        current=bool(snapshot.isCurrent()),
        note=tree.findtext("description") or "",
    )


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"

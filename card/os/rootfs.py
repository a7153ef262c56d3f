"""The root file system of programs on the card: the host's, read-only, with the ramdisk's files over it.

Init builds it once, in a mount namespace of its own:

    /           a small tmpfs: links to the host's folders, so that init itself still finds its files
    /.host      the host's file system as it is
    /.ramdisk   the unpacked ramdisk
    /.card      what programs see

``/.card`` is a skeleton: the host's top-level folders bound read-only, fresh /proc, /sys, /dev, /tmp
and /run. Where the ramdisk has files in a folder, overlayfs merges the two if it may (below a locked
mount it may not), else a folder of bind mounts does. Each program gets a copy of the namespace in
which its working directory is bound writable over ``/.card`` and ``/.card`` becomes the root.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mic_emu._native import lib
from mic_emu.card.os.cpio import Unpacker
from mic_emu.card.os.power import make_pipe
from mic_emu.card.os.program import HostRoot, Root, open_terminal
from mic_emu.namespaces import NamespaceError, check, mount

HOST, CARD, RAMDISK = "/.host", "/.card", "/.ramdisk"
_BIND = lib.MIC_MS_BIND | lib.MIC_MS_REC
_TMPFS = lib.MIC_MS_NOSUID | lib.MIC_MS_NODEV
_VIRTUAL = _TMPFS | lib.MIC_MS_NOEXEC
# Folders of the card's own: never the host's, never a writable working directory (except below /tmp, /run).
_OWN = ("proc", "sys", "dev", "tmp", "run")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "net/tun", "fuse")
_SMALL_FOLDER = 2000  # entries that may become bind mounts one by one
_KEPT_FLAGS = {
    "nosuid": lib.MIC_MS_NOSUID,
    "nodev": lib.MIC_MS_NODEV,
    "noexec": lib.MIC_MS_NOEXEC,
    "noatime": lib.MIC_MS_NOATIME,
    "nodiratime": lib.MIC_MS_NODIRATIME,
    "relatime": lib.MIC_MS_RELATIME,
}


@dataclass(frozen=True)
class RootConfig:
    """What the card's root is made of.

    ramdisk:  cpio archive, or empty
    hosts:    names for /etc/hosts and their addresses
    expose:   folders of the host in /tmp or /run that programs shall see nevertheless, read-only
    shared:   folders below those that programs may write to, by their short names on the card
    links:    files of the run directory that come and go with a device, by their usual names
    """

    hostname: str
    ramdisk: bytes | memoryview = b""
    hosts: Mapping[str, str] = field(default_factory=dict)
    expose: Sequence[str] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)


class CardRoot:
    """The root that ``build`` made."""

    initctl = f"{CARD}/run/initctl"

    def enter(self, cwd: str) -> None:
        """Make it this process's root, with ``cwd`` writable if it is a folder of the host's.

        The process has one thread and exits or executes afterwards. Raises NamespaceError, OSError.
        """
        check(lib.mic_ns_unshare(lib.MIC_NS_MNT), "a mount namespace for the program")
        # A folder that is not there for the card, say in a file system mounted since its boot, fails as a
        # working directory, by its name.
        if _bindable(cwd) and os.path.isdir(HOST + cwd):
            self._bind_writable(cwd)
        os.chdir(CARD)
        check(lib.mic_ns_pivot_root(b".", b"."), "the card's root")
        check(lib.mic_ns_detach(b"."), "the host's root")
        os.chdir("/")

    def _bind_writable(self, cwd: str) -> None:
        target = CARD + cwd
        if cwd.split("/")[1] in ("tmp", "run"):
            os.makedirs(target, 0o755, exist_ok=True)
        # A link on the way would be followed in init's root, not in the card's.
        if os.path.realpath(target) == target and os.path.isdir(target):
            mount(HOST + cwd, target, None, _BIND)

    def open_terminal(self) -> tuple[int, str]:
        """A terminal of the card's own devpts."""
        return open_terminal(f"{CARD}/dev/pts/ptmx")


def _bindable(cwd: str) -> bool:
    clean = os.path.normpath(cwd)
    return (
        clean == cwd
        and cwd.startswith("/")
        and cwd != "/"
        and cwd.split("/")[1] not in ("proc", "sys", "dev")
    )


def make_root(contained: bool, config: RootConfig) -> tuple[Root, list[str]]:
    """The programs' root, and a sentence for each thing it cannot offer.

    contained:  this process is in user and mount namespaces of the card's own
    To be called in init. Raises CpioError for a bad ramdisk. A machine that forbids mounts gives the
    host's own file system.
    """
    if not contained:
        return HostRoot(), _plain_notes(config, "the card has no mount namespace")
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(lib.mic_ns_unshare(lib.MIC_NS_MNT), "a mount namespace for init")
        return CardRoot(), _Builder(config).build()
    except NamespaceError as e:
        check(lib.mic_ns_enter(home, lib.MIC_NS_MNT), "going back to the card OS's mounts")
        return HostRoot(), _plain_notes(config, str(e.strerror))
    finally:
        os.close(home)


def _plain_notes(config: RootConfig, why: str) -> list[str]:
    notes = [f"programs see the host's file system as it is, writable: {why}"]
    if config.ramdisk:
        notes.append("the ramdisk is not used")
    return notes


def mount_points(below: str) -> Iterator[tuple[str, int]]:
    """(path, flags to keep in a remount) of all mounts at and below a path."""
    with open("/proc/self/mountinfo", "rb") as f:
        for line in f:
            fields = line.split()
            path = os.fsdecode(fields[4].decode("unicode_escape").encode("latin-1"))
            if path == below or path.startswith(below.rstrip("/") + "/"):
                words = fields[5].decode().split(",")
                yield path, sum(flag for word, flag in _KEPT_FLAGS.items() if word in words)


def read_only(path: str) -> None:
    """Make everything mounted at ``path`` and below read-only. Raises NamespaceError."""
    rc = lib.mic_ns_read_only(os.fsencode(path))
    if rc >= 0:
        return
    for at, kept in list(mount_points(path)):
        mount(None, at, None, lib.MIC_MS_REMOUNT | lib.MIC_MS_BIND | lib.MIC_MS_RDONLY | kept)


class _Builder:
    def __init__(self, config: RootConfig) -> None:
        self.config = config
        self.notes: list[str] = []

    def build(self) -> list[str]:
        """Everything; afterwards ``CardRoot.enter`` works in children. Returns the notes."""
        self.move_host()
        self.unpack()
        mount("card", CARD, "tmpfs", lib.MIC_MS_NOSUID, "mode=755")
        self.merge("", skeleton=True)
        for name in _OWN:
            os.makedirs(f"{CARD}/{name}", exist_ok=True)
        self.name_files()
        read_only(CARD)
        self.virtual()
        self.devices()
        self.scratch()
        return self.notes

    def move_host(self) -> None:
        """A small tmpfs becomes the root, the host's file system goes to ``/.host`` in it."""
        mount(None, "/", None, lib.MIC_MS_REC | lib.MIC_MS_PRIVATE)
        base = next(p for p in ("/mnt", "/tmp", "/usr") if os.path.isdir(p))
        mount("init", base, "tmpfs", _TMPFS, "mode=755")
        for name in (HOST, CARD, RAMDISK):
            os.mkdir(base + name)
        check(lib.mic_ns_pivot_root(os.fsencode(base), os.fsencode(base + HOST)), "init's root")
        os.chdir("/")
        for name in os.listdir(HOST):
            if not os.path.lexists(f"/{name}"):
                os.symlink(f"{HOST}/{name}", f"/{name}")

    def unpack(self) -> None:
        if not self.config.ramdisk:
            return
        mount("ramdisk", RAMDISK, "tmpfs", _TMPFS & ~lib.MIC_MS_NODEV, "mode=755")
        unpacker = Unpacker(RAMDISK, links=_folder_links(HOST))
        unpacker.unpack(self.config.ramdisk)
        self.notes += unpacker.skipped

    # --- merging the host's folders with the ramdisk's ---

    def merge(self, rel: str, skeleton: bool = False) -> None:
        """Make ``CARD/rel`` show the host's folder with the ramdisk's files over it."""
        host, ramdisk, card = (os.path.join(p, rel) if rel else p for p in (HOST, RAMDISK, CARD))
        if not skeleton and self.overlay(host, ramdisk, card):
            return
        names = sorted({*os.listdir(host), *_names(ramdisk)})
        if len(names) > _SMALL_FOLDER:
            mount(host, card, None, _BIND)
            self.place_over(ramdisk, card)
            return
        for name in names:
            if rel == "" and (name in _OWN or name == "lost+found"):
                continue
            path = os.path.join(rel, name)
            upper, lower = os.path.join(ramdisk, name), os.path.join(host, name)
            if _is_folder(upper) and _is_folder(lower):
                os.mkdir(os.path.join(card, name))
                self.merge(path)
            else:
                self.place(upper if os.path.lexists(upper) else lower, os.path.join(card, name))

    def overlay(self, host: str, ramdisk: str, card: str) -> bool:
        """Let overlayfs merge, where no mount lies below (it would be hidden) and the kernel permits."""
        if any(True for _ in mount_points(host)):
            return False
        lower = ":".join(
            p.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for p in (ramdisk, host)
        )
        try:
            mount("card", card, "overlay", lib.MIC_MS_RDONLY, f"lowerdir={lower}")
        except NamespaceError:
            return False
        return True

    def place(self, source: str, target: str) -> None:
        """Bind one file or folder, or copy one link. What vanishes or is refused becomes a note."""
        try:
            mode = os.lstat(source).st_mode
            if stat.S_ISLNK(mode):
                os.symlink(os.readlink(source), target)
                return
            if stat.S_ISDIR(mode):
                os.mkdir(target)
            else:
                os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
            mount(source, target, None, _BIND)
        except OSError as e:
            self.notes.append(f"{target.removeprefix(CARD)} is not on the card: {e.strerror}")

    def place_over(self, ramdisk: str, card: str) -> None:
        """Bind the ramdisk's files over existing ones of a folder that cannot be rebuilt."""
        for folder, _, files in os.walk(ramdisk):
            for name in files:
                source = os.path.join(folder, name)
                target = os.path.join(card, os.path.relpath(source, ramdisk))
                try:
                    mount(source, target, None, lib.MIC_MS_BIND)
                except NamespaceError:
                    self.notes.append(f"{target.removeprefix(CARD)} of the ramdisk could not be placed")

    # --- what is the card's own ---

    def name_files(self) -> None:
        """/etc/hostname and /etc/hosts, unless the ramdisk brings them."""
        own = {"127.0.0.1": "localhost", "::1": "localhost ip6-localhost"}
        hosts = "".join(f"{address}\t{name}\n" for address, name in own.items())
        hosts += "".join(f"{address}\t{name}\n" for name, address in self.config.hosts.items())
        if self.config.hostname not in self.config.hosts:
            hosts += f"127.0.1.1\t{self.config.hostname}\n"
        for name, text in (("hostname", f"{self.config.hostname}\n"), ("hosts", hosts)):
            target = f"{CARD}/etc/{name}"
            if os.path.lexists(f"{RAMDISK}/etc/{name}") or not os.path.isfile(target):
                continue
            with open(f"/{name}.card", "w") as f:
                f.write(text)
            mount(f"/{name}.card", os.path.realpath(target), None, lib.MIC_MS_BIND)

    def virtual(self) -> None:
        """/proc and /sys of the card's own pid and network namespaces; the host's where forbidden."""
        for name, fstype, flags in (("proc", "proc", 0), ("sys", "sysfs", lib.MIC_MS_RDONLY)):
            target = f"{CARD}/{name}"
            try:
                mount(fstype, target, fstype, _VIRTUAL | flags)
            except NamespaceError as e:
                self.notes.append(f"/{name} on the card is the host's: {e.strerror}")
                mount(f"{HOST}/{name}", target, None, _BIND)
                if name == "sys":
                    read_only(target)

    def devices(self) -> None:
        dev = f"{CARD}/dev"
        mount("dev", dev, "tmpfs", lib.MIC_MS_NOSUID | lib.MIC_MS_NOEXEC, "mode=755")
        for name in _DEVICES:
            if os.path.exists(f"{HOST}/dev/{name}"):
                os.makedirs(os.path.dirname(f"{dev}/{name}"), exist_ok=True)
                self.place(f"{HOST}/dev/{name}", f"{dev}/{name}")
        links = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "core": "/proc/kcore"}
        links |= {name: f"/proc/self/fd/{n}" for n, name in enumerate(("stdin", "stdout", "stderr"))}
        for name, to in links.items():
            os.symlink(to, f"{dev}/{name}")
        for name in ("pts", "shm"):
            os.mkdir(f"{dev}/{name}")
        mount(
            "devpts",
            f"{dev}/pts",
            "devpts",
            _VIRTUAL & ~lib.MIC_MS_NODEV,
            "newinstance,ptmxmode=0666,mode=0620",
        )
        mount("shm", f"{dev}/shm", "tmpfs", _TMPFS, "mode=1777")

    def scratch(self) -> None:
        """/tmp, /run and /var/tmp: writable, shared by all programs of the card, gone with it."""
        for name, mode in (("tmp", 1777), ("run", 755), ("var/tmp", 1777)):
            if os.path.isdir(f"{CARD}/{name}") and not os.path.islink(f"{CARD}/{name}"):
                mount("scratch", f"{CARD}/{name}", "tmpfs", _TMPFS, f"mode={mode}")
        os.makedirs(f"{CARD}/run/lock", exist_ok=True)
        make_pipe(CardRoot.initctl)
        # The host's resolver file is often a link to something in its /run.
        resolver = os.path.realpath(f"{HOST}/etc/resolv.conf").removeprefix(HOST)
        if resolver.startswith("/run/") and os.path.isfile(HOST + resolver):
            os.makedirs(os.path.dirname(CARD + resolver), exist_ok=True)
            with open(HOST + resolver, "rb") as source, open(CARD + resolver, "wb") as copy:
                copy.write(source.read(1 << 16))
        for path in self.config.expose:
            if not os.path.exists(CARD + path):
                os.makedirs(CARD + path)
                mount(HOST + path, CARD + path, None, _BIND)
                read_only(CARD + path)
        for name, path in self.config.shared.items():
            mount(HOST + path, CARD + path, None, lib.MIC_MS_BIND)
            os.symlink(path, CARD + name)
        for name, path in self.config.links.items():
            os.symlink(path, CARD + name)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _folder_links(root: str) -> dict[str, str]:
    """Top-level links to folders (``lib -> usr/lib``), with targets inside the root."""
    found = {}
    for entry in os.scandir(root):
        if entry.is_symlink():
            target = os.readlink(entry.path)
            if _is_folder(os.path.join(root, target.lstrip("/"))):
                found[entry.name] = target
    return found

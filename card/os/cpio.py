"""The ramdisk: cpio archives in "newc" form, gzip allowed, several behind one another as Linux takes them.

Archives come from anywhere, so everything is bounded and no path leaves the folder that is unpacked
into: ``..`` is refused, and symbolic links on the way are resolved here, inside the archive's own
root, never by the kernel.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from mic_emu.errors import MicemuError

MAX_BYTES = 1 << 30  # of an unpacked ramdisk
MAX_ENTRIES = 200_000
_MAX_NAME = 4096
_MAX_LINKS = 40
_HEADER = 110
_TRAILER = b"TRAILER!!!"
_NUMBERS = re.compile(rb"[0-9A-Fa-f]{104}")
_OTHER = {
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x89LZO": "lzo",
}


class CpioError(MicemuError):
    """The ramdisk is no archive that can be unpacked; the sentence says where it is wrong."""


@dataclass(frozen=True)
class Entry:
    """One member. ``path`` is relative and clean; ``content`` is a symbolic link's target, too."""

    path: str
    mode: int
    content: memoryview
    mtime: int
    uid: int
    gid: int
    hard_link: tuple[int, int, int] | None  # identity when it has several names


def expand(archive: bytes | memoryview, limit: int = MAX_BYTES) -> memoryview:
    """The archive without gzip; at most ``limit`` bytes. Raises CpioError."""
    view = memoryview(archive)
    head = bytes(view[:6])
    for magic, name in _OTHER.items():
        if head.startswith(magic):
            raise CpioError(f"the ramdisk is compressed with {name}: only gzip or no compression can be used")
    if head[:2] != b"\x1f\x8b":
        return view
    out = bytearray()
    rest = bytes(view)
    while rest[:2] == b"\x1f\x8b":
        unzip = zlib.decompressobj(wbits=31)
        try:
            out += unzip.decompress(rest, limit + 1 - len(out))
        except zlib.error as e:
            raise CpioError(f"the ramdisk's gzip data is damaged: {e}") from e
        if len(out) > limit:
            raise CpioError(f"the ramdisk unpacks to more than {limit} bytes", errno.EFBIG)
        if not unzip.eof:
            raise CpioError("the ramdisk's gzip data is truncated")
        rest = unzip.unused_data.lstrip(b"\0")
    return memoryview(bytes(out))


def _clean(name: bytes) -> str:
    parts = [p for p in name.split(b"/") if p not in (b"", b".")]
    if b".." in parts:
        raise CpioError(f"the ramdisk has a path with '..' in it: {os.fsdecode(name)}")
    return os.fsdecode(b"/".join(parts))


def parse(archive: memoryview) -> Iterator[Entry]:
    """Members of an expanded archive. Raises CpioError with the offset of what is wrong."""
    at, count, end = 0, 0, len(archive)
    while True:
        # Behind a trailer, and between concatenated archives, zeros fill up.
        while at < end and archive[at] == 0:
            at += 4 - at % 4
        if at >= end:
            if count == 0:
                raise CpioError("the ramdisk is empty")
            return
        if end - at < _HEADER:
            raise CpioError(f"the ramdisk is truncated: a header at byte {at} is cut")
        head = bytes(archive[at : at + _HEADER])
        if head[:6] not in (b"070701", b"070702"):
            raise CpioError(f"the ramdisk is no cpio archive in newc form: byte {at} begins {head[:6]!r}")
        if not _NUMBERS.fullmatch(head, 6):  # int() alone would take signs, blanks and underscores
            raise CpioError(f"the ramdisk's header at byte {at} has no hexadecimal numbers")
        numbers = [int(head[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        ino, mode, uid, gid, nlink, mtime, size, major, minor, _, _, name_len, check = numbers
        if not 1 <= name_len <= _MAX_NAME:
            raise CpioError(f"the ramdisk has a name of {name_len} bytes at byte {at}")
        body = (at + _HEADER + name_len + 3) & ~3
        if body + size > end:
            raise CpioError(f"the ramdisk is truncated: a member at byte {at} wants {size} bytes")
        name = bytes(archive[at + _HEADER : at + _HEADER + name_len]).partition(b"\0")[0]
        content = archive[body : body + size]
        if head[5:6] == b"2" and sum(content) & 0xFFFFFFFF != check:
            raise CpioError(f"the ramdisk's checksum of {os.fsdecode(name)} is wrong")
        at = (body + size + 3) & ~3
        if name == _TRAILER:
            count += 1
            continue
        count += 1
        if count > MAX_ENTRIES:
            raise CpioError(f"the ramdisk has more than {MAX_ENTRIES} members", errno.EFBIG)
        link = (ino, major, minor) if nlink > 1 and stat.S_ISREG(mode) else None
        yield Entry(_clean(name), mode, content, mtime, uid, gid, link)


@dataclass
class Unpacker:
    """Unpacks into ``dest``, a folder that is ours alone.

    links:    symbolic links that already count (path -> target), such as the host's ``lib -> usr/lib``,
              so that a member ``lib/x`` lands in ``usr/lib``
    skipped:  members that were left out, and why
    """

    dest: str
    links: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    files: int = 0
    _names: dict[tuple[int, int, int], str] = field(default_factory=dict)

    def unpack(self, archive: bytes | memoryview) -> None:
        """Everything in order; later members replace earlier ones. Raises CpioError, OSError."""
        total = 0
        for entry in parse(expand(archive)):
            total += len(entry.content)
            if total > MAX_BYTES:
                raise CpioError(f"the ramdisk unpacks to more than {MAX_BYTES} bytes", errno.EFBIG)
            self._add(entry)

    def resolve(self, path: str) -> str:
        """Follow links in all but the last component, inside the archive's root."""
        todo, hops = path.split("/"), 0
        done: list[str] = []
        while len(todo) > 1:
            part = todo.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                done = done[:-1]
                continue
            target = self.links.get("/".join([*done, part]))
            if target is None:
                done.append(part)
                continue
            hops += 1
            if hops > _MAX_LINKS:
                raise CpioError(f"the ramdisk's links on the way to {path} go round in a circle")
            done = [] if target.startswith("/") else done
            todo = target.split("/") + todo
        return "/".join([*done, *todo])

    def _add(self, entry: Entry) -> None:
        if not entry.path:
            return
        path = self.resolve(entry.path)
        full = os.path.join(self.dest, path)
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFDIR:
            if path not in self.links:
                self._folder(path)
                os.chmod(full, entry.mode & 0o7777)
            return
        if kind not in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO):
            self.skipped.append(f"{entry.path}: device nodes and sockets are not made")
            return
        self._folder(os.path.dirname(path))
        self._remove(full, path, entry)
        if kind == stat.S_IFLNK:
            self._link(entry, path, full)
        elif kind == stat.S_IFIFO:
            os.mkfifo(full, entry.mode & 0o7777)
        else:
            self._file(entry, full)
        self.files += 1

    def _folder(self, path: str) -> None:
        """Make missing folders; every component is a real folder, because ``path`` is resolved."""
        at = self.dest
        for part in path.split("/") if path else ():
            at = os.path.join(at, part)
            try:
                os.mkdir(at, 0o755)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(at).st_mode):
                    raise CpioError(
                        f"the ramdisk uses {os.path.relpath(at, self.dest)} as a folder"
                    ) from None

    def _remove(self, full: str, path: str, entry: Entry) -> None:
        self.links.pop(path, None)
        try:
            if stat.S_ISDIR(os.lstat(full).st_mode):
                raise CpioError(f"the ramdisk has {entry.path} both as a folder and as something else")
            os.unlink(full)
        except FileNotFoundError:
            pass

    def _link(self, entry: Entry, path: str, full: str) -> None:
        if len(entry.content) >= _MAX_NAME or not entry.content:
            raise CpioError(f"the ramdisk's link {entry.path} has a target of {len(entry.content)} bytes")
        target = os.fsdecode(bytes(entry.content).rstrip(b"\0"))
        if not target or "\0" in target:
            raise CpioError(f"the ramdisk's link {entry.path} has no usable target")
        os.symlink(target, full)
        self.links[path] = target

    def _file(self, entry: Entry, full: str) -> None:
        first = self._names.get(entry.hard_link) if entry.hard_link else None
        if first and os.path.isfile(first) and not os.path.islink(first):
            os.link(first, full, follow_symlinks=False)
            if not entry.content:
                return
        elif entry.hard_link:
            self._names[entry.hard_link] = full
        fd = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            rest = entry.content
            while rest:
                rest = rest[os.write(fd, rest) :]
            if entry.uid or entry.gid:
                try:
                    os.fchown(fd, entry.uid, entry.gid)
                except OSError:
                    pass  # ids that this user namespace does not have: the file stays root's
            os.fchmod(fd, entry.mode & 0o7777)
            os.utime(fd, (entry.mtime, entry.mtime))
        finally:
            os.close(fd)

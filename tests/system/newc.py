"""Writes cpio archives in newc form for tests, well-formed or not."""

from __future__ import annotations

import stat


def member(
    name: str | bytes,
    content: bytes = b"",
    mode: int = stat.S_IFREG | 0o644,
    *,
    ino: int = 0,
    nlink: int = 1,
    size: int | None = None,
    name_len: int | None = None,
    magic: bytes = b"070701",
    check: int = 0,
    uid: int = 0,
) -> bytes:
    """One member, padded."""
    raw = (name.encode() if isinstance(name, str) else name) + b"\0"
    numbers = (
        ino, mode, uid, 0, nlink, 1_600_000_000, len(content) if size is None else size,
        0, 0, 0, 0, len(raw) if name_len is None else name_len, check,
    )  # fmt: skip
    head = magic + b"".join(b"%08x" % n for n in numbers) + raw
    return _pad(head) + _pad(content)


def _pad(b: bytes) -> bytes:
    return b + bytes(-len(b) % 4)


def archive(*members: bytes) -> bytes:
    """Members and the trailer."""
    return b"".join(members) + member("TRAILER!!!", mode=0)


def folder(name: str, perm: int = 0o755) -> bytes:
    return member(name, mode=stat.S_IFDIR | perm)


def link(name: str, target: str) -> bytes:
    return member(name, target.encode(), stat.S_IFLNK | 0o777)

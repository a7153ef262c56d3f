"""The ramdisk's unpacker: what Linux takes is taken, the rest is an error, nothing leaves the folder."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from newc import archive, folder, link, member

from mic_emu.card.os import cpio
from mic_emu.card.os.cpio import CpioError, Unpacker


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "dest").mkdir()
    return tmp_path / "dest"


def unpack(dest: Path, blob: bytes, links: dict[str, str] | None = None) -> Unpacker:
    u = Unpacker(str(dest), links=links or {})
    u.unpack(blob)
    return u


def test_files_folders_links_and_attributes(dest: Path) -> None:
    """Contents, modes, times, links, fifos and missing parent folders."""
    u = unpack(
        dest,
        archive(
            folder(".", 0o755),
            folder("etc", 0o750),
            member("etc/motd", b"hello\n", stat.S_IFREG | 0o600),
            member("./bin/tool", b"#!/bin/sh\n", stat.S_IFREG | 0o755),
            link("etc/alias", "motd"),
            member("pipe", mode=stat.S_IFIFO | 0o600),
            member("dev/null", mode=stat.S_IFCHR | 0o666),
            member("empty"),
        ),
    )
    assert (dest / "etc/motd").read_text() == "hello\n"
    assert stat.S_IMODE((dest / "etc/motd").stat().st_mode) == 0o600
    assert (dest / "etc/motd").stat().st_mtime == 1_600_000_000
    assert stat.S_IMODE((dest / "etc").stat().st_mode) == 0o750
    assert stat.S_IMODE((dest / "bin/tool").stat().st_mode) == 0o755
    assert os.readlink(dest / "etc/alias") == "motd"
    assert stat.S_ISFIFO((dest / "pipe").stat().st_mode)
    assert (dest / "empty").read_bytes() == b""
    assert u.skipped == ["dev/null: device nodes and sockets are not made"]
    assert u.files == 5


def test_gzip_concatenation_and_padding(dest: Path) -> None:
    """gzip, several gzip members, several archives with zeros between, as Linux accepts them."""
    one, two = archive(member("a", b"1")), archive(member("b", b"2"), member("a", b"3"))
    unpack(dest, gzip.compress(one + bytes(512)) + gzip.compress(two))
    assert (dest / "a").read_bytes() == b"3"
    assert (dest / "b").read_bytes() == b"2"
    unpack(dest, one + bytes(508) + two + bytes(1024))
    assert (dest / "a").read_bytes() == b"3"


def test_hard_links(dest: Path) -> None:
    """Names of one file share it; the content comes with the last."""
    shared = {"ino": 7, "nlink": 3}
    unpack(dest, archive(member("a", **shared), member("b", **shared), member("c", b"data", **shared)))
    assert (dest / "a").read_bytes() == b"data"
    assert (dest / "a").stat().st_nlink == 3


@pytest.mark.peer("cpio")
def test_made_by_the_real_cpio(dest: Path, tmp_path: Path) -> None:
    """An archive of GNU cpio unpacks to the same tree."""
    src = tmp_path / "src"
    (src / "d/e").mkdir(parents=True)
    (src / "d/e/f").write_bytes(os.urandom(100_001))
    (src / "d/l").symlink_to("e/f")
    os.link(src / "d/e/f", src / "d/g")
    names = "\n".join(str(p.relative_to(src)) for p in sorted(src.rglob("*")))
    blob = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        cwd=src,
        input=names.encode(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    unpack(dest, gzip.compress(blob))
    subprocess.run(["diff", "-r", src, dest], check=True)
    assert (dest / "d/g").stat().st_ino == (dest / "d/e/f").stat().st_ino


def test_links_on_the_way_are_followed_inside_the_archive(dest: Path) -> None:
    """lib/x with lib -> usr/lib lands in usr/lib, for links of the archive and of the host, absolute ones too."""
    unpack(
        dest,
        archive(folder("usr"), folder("usr/lib"), link("lib", "usr/lib"), member("lib/x", b"1"),
                link("abs", "/usr/lib"), member("abs/y", b"2"), link("up", "../../../usr"), member("up/lib/z", b"3"),
                folder("bin"), member("bin/tool", b"4")),
        links={"bin": "usr/bin"},
    )  # fmt: skip
    for name in "xyz":
        assert (dest / "usr/lib" / name).exists()
    assert (dest / "usr/bin/tool").read_bytes() == b"4"
    assert not (dest / "bin").exists()


def test_a_name_ends_at_its_first_zero(dest: Path) -> None:
    """Zero bytes inside a name end it, as in C."""
    unpack(dest, archive(member(b"a\0b", b"x")))
    assert os.listdir(dest) == ["a"]


@pytest.mark.parametrize(
    "members",
    [
        [member("../outside/x", b"!")],
        [member("a/../../outside/x", b"!")],
        [member("/../outside/x", b"!")],
        [member("..", b"!")],
        [folder("../outside/d")],
    ],
)
def test_dot_dot_is_refused(dest: Path, members: list[bytes]) -> None:
    """A path with '..' is an error before anything is written for it."""
    with pytest.raises(CpioError, match=r"'\.\.'"):
        unpack(dest, archive(*members))
    assert os.listdir(dest.parent / "outside") == []


@pytest.mark.parametrize("target", ["../outside", "{outside}", "/", "../../../../../.."])
def test_links_to_the_outside_lead_nowhere(dest: Path, target: str) -> None:
    """Files behind a link that points out of the folder stay inside it."""
    outside = dest.parent / "outside"
    target = target.format(outside=outside)
    unpack(dest, archive(link("l", target), member("l/x", b"!"), member("/abs", b"?")))
    assert os.listdir(outside) == []
    assert not Path("/x").exists()
    assert not Path("/abs").exists()
    assert (dest / "abs").read_bytes() == b"?"


def test_a_link_is_replaced_not_followed(dest: Path) -> None:
    """A file whose name is a link's replaces the link."""
    victim = dest.parent / "outside/victim"
    victim.write_text("safe")
    unpack(dest, archive(link("f", str(victim)), member("f", b"new")))
    assert victim.read_text() == "safe"
    assert (dest / "f").read_bytes() == b"new"
    shared = {"ino": 1, "nlink": 2}
    unpack(dest, archive(member("h1", **shared), link("h1", str(victim)), member("h2", b"evil", **shared)))
    assert victim.read_text() == "safe"


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (b"", "is empty"),
        (bytes(512), "is empty"),
        (b"070701", "truncated"),
        (b"070707" + bytes(200), "no cpio archive in newc form: byte 0 begins b'070707'"),
        (b"\xfd7zXZ\0", "compressed with xz"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
        (b"\x1f\x8b\x08\0garbage", "gzip data is"),
        (gzip.compress(archive(member("a")), mtime=0)[:-9], "gzip data is truncated"),
        (b"070701" + b"zz" * 52 + bytes(10), "no hexadecimal"),
        (b"070701" + b"-0000001" * 13 + bytes(10), "no hexadecimal"),
        (b"070701" + b"  1_0000" * 13 + bytes(10), "no hexadecimal"),
        (member("a", size=1 << 31), "truncated: a member at byte 0 wants 2147483648"),
        (member("a", name_len=0), "a name of 0 bytes"),
        (member("a", name_len=5000), "a name of 5000 bytes"),
        (archive(member("a", b"data", magic=b"070702", check=1)), "checksum of a is wrong"),
        (archive(member("a", b"x"), member("a/b", b"y")), "uses a as a folder"),
        (archive(folder("a"), member("a", b"y")), "both as a folder"),
        (archive(link("a", "b"), link("b", "a"), member("a/x")), "round in a circle"),
        (archive(member("l", b"", stat.S_IFLNK | 0o777)), "a target of 0 bytes"),
        (archive(member("x" * 300, b"")), "File name too long"),
    ],
)
def test_bad_archives_are_named(dest: Path, blob: bytes, why: str) -> None:
    """Each damage has its sentence."""
    with pytest.raises((CpioError, OSError), match=why):
        unpack(dest, blob)


def test_bombs_are_bounded(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gzip bomb, too many members, too many bytes end in an error, not in a full machine."""
    monkeypatch.setattr(cpio, "MAX_ENTRIES", 100)
    monkeypatch.setattr(cpio, "MAX_BYTES", 1 << 20)
    with pytest.raises(CpioError, match="more than 1048576 bytes"):
        cpio.expand(gzip.compress(bytes(4 << 20)), 1 << 20)
    with pytest.raises(CpioError, match="more than 100 members"):
        unpack(dest, archive(*(member(f"f{n}") for n in range(101))))
    with pytest.raises(CpioError, match="more than 1048576 bytes"):
        unpack(dest, archive(*(member(f"g{n}", bytes(1 << 16)) for n in range(17))))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_are_an_error_or_stay_inside(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Mutated archives never raise anything else and never write outside."""
    top = tmp_path_factory.mktemp("fuzz")
    (top / "dest").mkdir()
    good = archive(
        folder("d"), member("d/f", b"abc"), link("l", "/d"), member("l/g", b"x"), link("m", "../..")
    )
    blob = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.sampled_from(b"0123456789abcdef./\0l"))
    try:
        unpack(top / "dest", bytes(blob[: data.draw(st.integers(0, len(blob)))]))
    except (CpioError, OSError):
        pass
    assert os.listdir(top) == ["dest"]
    for path, folders, _ in os.walk(top):
        for name in folders:
            os.chmod(os.path.join(path, name), 0o700)
    shutil.rmtree(top)

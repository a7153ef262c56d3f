"""What programs on the card see: the host read-only, the ramdisk over it, their own folder writable."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import cardlab
import pytest
from cardrun import Card, booted
from newc import archive, folder, link, member

pytestmark = pytest.mark.contained


def ramdisk(*members: bytes) -> str:
    """For the options of ``booted``."""
    return base64.b64encode(archive(*members)).decode()


@pytest.fixture(scope="module", params=["root", "user"])
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    """One card for all tests that leave it as it was."""
    with booted(user=request.param == "user") as c:
        c.user = request.param == "user"
        yield c
    cardlab.forget_userland()


@pytest.fixture
def folder_of(card: Card) -> Iterator[Path]:
    """A folder that belongs to the card's user, not below /tmp."""
    if not os.access("/var", os.W_OK):
        pytest.skip("needs root: a folder of the host outside of /tmp")
    path = Path("/var") / f"micemu-test-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir()
    if card.user and os.geteuid() == 0:
        os.chown(path, cardlab.USER, cardlab.USER)
    yield path
    shutil.rmtree(path)


def mounts_at_mnt() -> list[str]:
    """What is mounted at /mnt here, on the host."""
    return [m for m in Path("/proc/self/mountinfo").read_text().splitlines() if " /mnt " in m]


def sh(card: Card, script: str, cwd: Path | str = "/") -> str:
    return card.sh(script, user=card.user, cwd=cwd)


def test_working_directory_is_writable_the_rest_is_not(card: Card, folder_of: Path) -> None:
    """The caller's folder is writable at its own path; the host's other folders are read-only."""
    (folder_of / "sub").mkdir(mode=0o777)
    (folder_of / "sub").chmod(0o777)
    out = sh(card, "pwd; echo x > new; echo y > sub/new; for d in / /usr /etc /var /home /sys; do "
                   "touch $d/micemu-probe 2>&1; done; true", folder_of)  # fmt: skip
    assert out.splitlines()[0] == str(folder_of)
    assert out.count("Read-only file system") == 6, out
    assert (folder_of / "new").read_text() == "x\n"
    assert (folder_of / "sub/new").read_text() == "y\n"
    assert (folder_of / "new").stat().st_uid == (
        cardlab.USER if card.user and not os.geteuid() else os.getuid()
    )


def test_another_program_does_not_see_it_writable(card: Card, folder_of: Path) -> None:
    """A folder is writable for the program that was called from it only."""
    assert "Read-only" in sh(card, f"touch {folder_of}/x 2>&1; true")
    assert os.listdir(folder_of) == []


def test_working_directory_below_tmp(card: Card) -> None:
    """A folder below the host's /tmp is there, writable, though the card has a /tmp of its own."""
    path = Path(f"/tmp/micemu-test-cwd-{os.getpid()}/deep")
    path.mkdir(parents=True)
    try:
        for p in (path.parent, path):
            p.chmod(0o777)
        assert sh(card, "pwd; echo z > f; ls", path).split() == [str(path), "f"]
        assert (path / "f").exists()
        assert sh(card, f"ls {path}") == "", "only its name is left for others"
    finally:
        shutil.rmtree(path.parent)


@pytest.mark.parametrize("cwd", ["/", "/usr/bin", "/proc", "/sys", "/dev"])
def test_working_directories_of_the_system(card: Card, cwd: str) -> None:
    """Any folder can be the caller's; the card's own ones stay the card's."""
    assert sh(card, "pwd", cwd) == cwd + "\n"
    if cwd == "/dev":
        assert "vda" not in sh(card, "ls", cwd).split()
    if cwd == "/":
        assert "Read-only" in sh(card, "touch x 2>&1; true", cwd)


def test_scratch_folders_are_shared_and_not_the_hosts(card: Card) -> None:
    """/tmp, /run, /dev/shm and /var/tmp are the card's: shared by its programs, unknown to the host."""
    name = f"micemu-test-{os.getpid()}"
    for place in ("/tmp", "/run", "/dev/shm", "/var/tmp"):
        sh(card, f"echo {place} > {place}/{name}")
        assert sh(card, f"cat {place}/{name}; rm {place}/{name}") == place + "\n"
        assert not Path(place, name).exists()
    assert "1777" in sh(card, "stat -c %a /tmp")


def test_devices_terminals_and_proc(card: Card) -> None:
    """The usual devices work, /proc shows the card's processes, /sys its network."""
    out = sh(card, "head -c 3 /dev/zero | wc -c; echo x > /dev/null; head -c 8 /dev/urandom | wc -c; "
                   "ls /dev/pts; readlink /dev/ptmx /dev/stdin; ls /sys/class/net")  # fmt: skip
    words = out.split()
    assert words[:2] == ["3", "8"]
    assert "pts/ptmx" in words
    assert words[-1] == "lo"
    assert "pytest" not in sh(card, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")


def test_host_name_files(card: Card) -> None:
    """/etc/hostname and /etc/hosts name the card; the host's files are as before."""
    before = Path("/etc/hosts").read_text()
    assert sh(card, "hostname; cat /etc/hostname; grep mic0 /etc/hosts").split()[:2] == ["mic0", "mic0"]
    assert Path("/etc/hosts").read_text() == before


def test_mounts_of_a_program_stay_with_it(card: Card) -> None:
    """A program may mount; nobody else sees it, and the host never."""
    before = mounts_at_mnt()
    sh(card, "mount -t tmpfs x /mnt && touch /mnt/inside")
    assert "inside" not in sh(card, "ls /mnt")
    assert mounts_at_mnt() == before


def test_old_root_is_out_of_reach(card: Card) -> None:
    """The host's writable tree is not mounted anywhere in a program's namespace."""
    out = sh(card, "cat /proc/self/mountinfo")
    for line in out.splitlines():
        point, options = line.split()[4:6]
        if not point.startswith(("/proc", "/dev", "/tmp", "/run", "/var/tmp")):
            assert options.split(",")[0] == "ro", line
    assert "/.host" not in out


def test_working_directory_that_the_card_does_not_have() -> None:
    """As in a file system that was mounted after the card's boot: the message names the folder and the fix."""
    with booted() as c:
        for cwd in ("/tmp/micemu-test-nowhere/deep", "/micemu-test-nowhere"):
            status, out = c.run(["true"], cwd=cwd)
            assert status == 126
            assert f"the working directory {cwd} cannot be used on the card: No such file or directory" in out
            assert "call it from another directory" in out


@pytest.mark.root
def test_links_in_the_way_of_the_working_directory() -> None:
    """A ramdisk that puts a link where the caller's folder is cannot redirect the writable mount."""
    base = Path(f"/var/micemu-test-link-{os.getpid()}")
    (base / "work").mkdir(parents=True)
    try:
        disk = ramdisk(link(f"{str(base)[1:]}", "/etc"))
        with booted(ramdisk=disk) as c:
            status, out = c.run(["sh", "-c", "pwd; touch x"], cwd=base / "work")
            assert status != 0
            assert "working directory" in out
    finally:
        shutil.rmtree(base)


# --- the ramdisk ---


FILES = (
    folder("etc"),
    member("etc/motd-card", b"from the ramdisk\n"),
    member("etc/hostname", b"ramdisk-name\n"),
    member("bin/card-tool", b"#!/bin/sh\necho tool runs\n", stat.S_IFREG | 0o755),
    member("opt/deep/er/file", b"deep\n"),
    member("newtop/file", b"top\n"),
    member("rootfile", b"root\n"),
    link("etc/card-link", "motd-card"),
    member("usr/share/card/x", b"share\n"),
)
CHECK = (
    "cat /etc/motd-card /etc/hostname /etc/card-link /opt/deep/er/file /newtop/file /rootfile /usr/share/card/x; "
    "card-tool; ls /etc | grep -cx passwd; ls /usr/share | wc -l; touch /etc/x 2>&1; touch /newtop/x 2>&1; true"
)


@pytest.mark.parametrize(
    "faults", [[], ["no overlay"], ["no mount_setattr"], ["no overlay", "no mount_setattr"]]
)
@pytest.mark.parametrize("user", [False, True])
def test_ramdisk_files_lie_over_the_hosts(user: bool, faults: list[str]) -> None:
    """Files of the ramdisk are added to and replace the host's, read-only, with overlayfs and without."""
    with booted(user=user, ramdisk=ramdisk(*FILES), faults=faults) as c:
        assert c.hello["notes"] == []
        lines = c.sh(CHECK, user=user, cwd="/").splitlines()
    assert lines[:8] == [
        "from the ramdisk", "ramdisk-name", "from the ramdisk", "deep", "top", "root", "share", "tool runs",
    ]  # fmt: skip
    assert lines[8] == "1"
    assert int(lines[9]) == len(os.listdir("/usr/share")) + 1
    assert lines[10].endswith("Read-only file system")
    assert lines[11].endswith("Read-only file system")


@pytest.mark.root
@pytest.mark.parametrize("user", [False, True])
def test_large_folders_without_overlay_are_patched_in_place(user: bool) -> None:
    """A folder too large for single mounts keeps the host's names: what has no place is listed."""
    big = Path(f"/var/micemu-test-big-{os.getpid()}")
    big.mkdir()
    try:
        for n in range(2100):
            (big / f"f{n}").write_text("host\n")
        rel = str(big)[1:]
        disk = ramdisk(member(f"{rel}/f7", b"card\n"), member(f"{rel}/new", b"card\n"))
        with booted(user=user, ramdisk=disk, faults=["no overlay"]) as c:
            assert c.hello["notes"] == [f"{big}/new of the ramdisk could not be placed"]
            assert c.sh(f"cat {big}/f7 {big}/f8", user=user, cwd="/") == "card\nhost\n"
        with booted(user=user, ramdisk=disk) as c:
            assert c.hello["notes"] == []
            assert c.sh(f"cat {big}/f7 {big}/new", user=user, cwd="/") == "card\ncard\n"
    finally:
        shutil.rmtree(big)


def test_bad_ramdisk_stops_the_card_with_its_sentence() -> None:
    """An archive that cannot be unpacked ends init with the reason."""
    with pytest.raises(AssertionError, match="compressed with xz"), booted(
        ramdisk=base64.b64encode(b"\xfd7zXZ\0" + bytes(99)).decode()
    ):  # fmt: skip
        pass


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        ("no proc", "/proc on the card is the host's: mount proc: Operation not permitted"),
        ("no sysfs", "/sys on the card is the host's: mount sysfs: Operation not permitted"),
    ],
)
def test_masked_proc_and_sys_fall_back(fault: str, note: str) -> None:
    """Containers that forbid fresh /proc or /sys get the host's, and a note."""
    with booted(faults=[fault]) as c:
        assert c.hello["notes"] == [note]
        assert c.sh("cat /proc/self/comm; ls -d /sys/class") == "cat\n/sys/class\n"


@pytest.mark.parametrize("fault", ["no tmpfs", "no pivot_root"])
def test_machines_without_mounts_fall_back_to_the_hosts_files(fault: str, tmp_path: Path) -> None:
    """Where the root cannot be built, programs see the host's, writable, and status can say so."""
    with booted(ramdisk=ramdisk(*FILES), faults=[fault]) as c:
        assert "programs see the host's file system as it is, writable" in c.hello["notes"][0]
        assert c.hello["notes"][1] == "the ramdisk is not used"
        assert c.sh("pwd; echo $(hostname); echo x > f", cwd=tmp_path) == f"{tmp_path}\nmic0\n"
        assert (tmp_path / "f").exists()


def test_exposed_folders() -> None:
    """A folder of the host's /tmp that the card OS exposes is there, read-only, with its live sockets."""
    place = Path(f"/tmp/micemu-test-expose-{os.getpid()}")
    place.mkdir()
    try:
        (place / "a").write_text("1\n")
        with booted(expose=[str(place)]) as c:
            (place / "b").write_text("2\n")
            assert c.sh(f"cat {place}/a {place}/b; touch {place}/c 2>&1; true").splitlines()[:2] == ["1", "2"]
        assert sorted(os.listdir(place)) == ["a", "b"]
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("where", ["lib/x", "sbin/x", "bin/x"])
def test_merged_usr_links_are_kept(where: str) -> None:
    """A ramdisk that has files in /lib does not replace the host's link to /usr/lib."""
    host = Path("/", where.split("/")[0])
    if not host.is_symlink():
        pytest.skip(f"{host} is no link on this machine: /usr is not merged")
    with booted(ramdisk=ramdisk(folder(where.split("/")[0]), member(where, b"x\n"))) as c:
        assert c.sh(f"readlink {host}; cat /{where}") == f"{os.readlink(host)}\nx\n"

"""The card's disk, used with ordinary tools over its NBD socket."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mic_emu.testing.machine import Machine

pytestmark = pytest.mark.system
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def tool(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a peer program."""
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=200, env={**os.environ, "PATH": PATH}, check=False
    )
    assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done


def uri(machine: Machine, disk: str = "vda", card: str = "mic0") -> str:
    return f"nbd+unix:///{disk}?socket={machine.card(card)['run_dir']}/{disk}.nbd"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def image(machine: Machine) -> Path:
    """64 MiB of random bytes."""
    path = machine.home / "disk.img"
    path.write_bytes(os.urandom(64 << 20))
    return path


@pytest.mark.peer("nbdinfo", "nbdcopy")
def test_nbdcopy_out_and_in_has_equal_checksums(machine: Machine, image: Path) -> None:
    """nbdinfo knows the size; nbdcopy reads the whole disk and writes another one; all checksums agree."""
    machine.boot("--disk", str(image), "--net", "none")
    assert tool("nbdinfo", "--size", uri(machine)).stdout.strip() == str(64 << 20)
    out = machine.home / "out.img"
    tool("nbdcopy", uri(machine), str(out))
    assert digest(out) == digest(image)
    fresh = machine.home / "in.img"
    fresh.write_bytes(os.urandom(64 << 20))
    tool("nbdcopy", str(fresh), uri(machine))
    machine.micemu("shutdown")
    assert digest(image) == digest(fresh)


@pytest.mark.peer("qemu-img")
def test_qemu_img_convert_reads_the_disk(machine: Machine, image: Path) -> None:
    """qemu-img convert over NBD gives the same bytes."""
    machine.boot("--disk", str(image), "--net", "none")
    out = machine.home / "out.img"
    tool(
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "raw",
        f"nbd:unix:{machine.card()['run_dir']}/vda.nbd:exportname=vda",
        str(out),
    )
    assert digest(out) == digest(image)


@pytest.mark.peer("mkfs.ext4", "e2fsck", "debugfs", "nbdcopy")
def test_ext4_image_is_clean_after_shutdown_and_holds_what_was_written(machine: Machine) -> None:
    """mkfs.ext4 -d, boot, change a file through NBD, shutdown: e2fsck -fn is clean and the file is there."""
    image, tree = machine.home / "fs.img", machine.home / "tree"
    tree.mkdir()
    (tree / "hello").write_text("from the host\n")
    with image.open("wb") as f:
        f.truncate(32 << 20)
    tool("mkfs.ext4", "-q", "-F", "-d", str(tree), str(image))
    machine.boot("--disk", str(image), "--net", "none")
    copy = machine.home / "copy.img"
    tool("nbdcopy", uri(machine), str(copy))
    (tree / "more").write_text("through the card\n")
    tool("debugfs", "-w", "-R", f"write {tree / 'more'} more", str(copy))
    tool("nbdcopy", str(copy), uri(machine))
    machine.micemu("shutdown")
    tool("e2fsck", "-fn", str(image))
    assert tool("debugfs", "-R", "cat more", str(image)).stdout == "through the card\n"


@pytest.mark.peer("fio")
@pytest.mark.parametrize("depth", [1, 32])
def test_fio_verifies_random_writes(machine: Machine, depth: int) -> None:
    """fio --ioengine=nbd writes with checksums and reads them back, at queue depth 1 and 32."""
    machine.boot("--net", "none")
    out = tool(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={uri(machine)}", "--rw=randwrite", "--bs=4k", f"--iodepth={depth}",
        "--size=16m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--output-format=json",
    ).stdout  # fmt: skip
    job: dict[str, Any] = json.loads(out[out.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["read"]["io_bytes"] == 16 << 20


@pytest.mark.peer("nbdinfo", "nbdcopy")
def test_read_only_disk_refuses_writes(machine: Machine, image: Path) -> None:
    """PATH:ro: the export is read-only, a writer fails, the image stays as it was."""
    before = digest(image)
    machine.boot("--disk", f"{image}:ro", "--net", "none")
    assert json.loads(tool("nbdinfo", "--json", uri(machine)).stdout)["exports"][0]["is_read_only"] is True
    zeros = machine.home / "zeros"
    zeros.write_bytes(bytes(1 << 20))
    failed = tool("nbdcopy", str(zeros), uri(machine), check=False)
    assert failed.returncode != 0
    machine.micemu("shutdown")
    assert digest(image) == before


@pytest.mark.peer("nbdinfo")
def test_vop_16_disks_are_added_and_removed_at_run_time(machine: Machine) -> None:
    """vop add brings vdb up while vda works; vop remove takes it away; the card stays online."""
    machine.boot("--net", "none")
    extra = machine.home / "extra.img"
    assert machine.json("vop", "add", "mic0", "block", f"path={extra}", "size=8M") == {"device": "block1"}
    assert tool("nbdinfo", "--size", uri(machine, "vdb")).stdout.strip() == str(8 << 20)
    machine.micemu("vop", "remove", "mic0", "block1")
    assert not (machine.run_dir / "mic0" / "vdb.nbd").exists()
    assert tool("nbdinfo", "--size", uri(machine)).returncode == 0
    assert machine.card()["state"] == "online"


@pytest.mark.peer("nbdcopy")
@pytest.mark.root
def test_full_file_system_under_the_image_is_an_error_for_the_writer(machine: Machine) -> None:
    """A sparse image on a full file system: the write fails with an error, the card lives on, nothing is lost."""
    small = machine.home / "small"
    small.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small))
    try:
        image = small / "disk.img"
        machine.boot("--disk", str(image), "--disk-size", "64M", "--net", "none")
        noise = machine.home / "noise"
        noise.write_bytes(os.urandom(16 << 20))
        assert tool("nbdcopy", str(noise), uri(machine), check=False).returncode != 0
        assert machine.card()["state"] == "online"
        assert machine.device("block")["state"] == "running"
        with image.open("rb") as f:
            assert f.read(1 << 20) == noise.read_bytes()[: 1 << 20]
        machine.micemu("stop")
    finally:
        tool("umount", str(small))

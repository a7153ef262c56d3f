"""COPY_DESC of a program by the host's DMA channel 0: VOP-30, 31, 32 from end to end (VOP 7)."""

from __future__ import annotations

import errno
import select
from pathlib import Path

import pytest
from test_device_file import Copy, block

from mic_emu.testing.machine import Machine, eventually
from mic_emu.vop.device_file import ADD_DEVICE, COPY_DESC, DeviceFile

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

LENGTHS = (64, 1000, 65536, 150001)
DRIVER = """
from mic_emu.vop import Driver

class Turned(Driver):
    device_type = 42
    buffers = 2
    buffer_size = 1 << 19

    def run(self):
        for n in %r:
            sent = bytes((7 * i + n) & 255 for i in range(n))
            got = bytes(self.request(data=sent, room=n))
            self.device.log(f"{n} bytes are {'right' if got == sent[::-1] else 'WRONG'}")
        while True:
            self.wait()
"""


def moved(f: DeviceFile, data: bytearray, *, complete: bool = False) -> int:
    """Bytes of one COPY_DESC; 0 when there is no chain, or no driver."""
    copy = Copy(data, update=complete)
    try:
        f.ioctl(COPY_DESC, copy.arg)
    except OSError as e:
        if e.errno != errno.ENODEV:
            raise
    return copy.out_len


def serve(f: DeviceFile, lengths: tuple[int, ...]) -> None:
    """Answer each request with its bytes turned round."""
    left = list(lengths)
    while left:
        assert f.poll(20) == select.POLLIN | select.POLLOUT
        data = bytearray(left[0])
        while left and moved(f, data):
            assert moved(f, data[::-1], complete=True) == left.pop(0)
            data = bytearray(left[0]) if left else data


def prepared(machine: Machine, folder: Path, *words: str) -> str:
    (folder / "turned.py").write_text(DRIVER % (LENGTHS,))
    card = machine.boot("--disk", "none", "--net", "none", *words)["cards"][0]
    machine.micemu("vop", "driver", "mic0", "turned:Turned", cwd=folder)
    return f"{card['run_dir']}/vop.sock"


def right(machine: Machine, lengths: tuple[int, ...]) -> None:
    for n in lengths:
        eventually(
            lambda n=n: f"{n} bytes are right" in machine.micemu("log").stdout, 30, f"the answer of {n} bytes"
        )  # type: ignore[misc]
    assert "WRONG" not in machine.micemu("log").stdout


def host_channel(machine: Machine) -> dict[str, int]:
    row: dict[str, int] = machine.json("dma", "mic0")["mic0"][0]["engine"]
    return row


@pytest.mark.parametrize("dma", [True, False])
def test_vop_30_31_program_copies_by_dma(machine: Machine, tmp_path: Path, dma: bool) -> None:
    """VOP-30, 31: byte exact at every length; what went by DMA is counted by program, debug file and engine alike."""
    path = prepared(machine, tmp_path)
    before, mapped = host_channel(machine)["bytes"], machine.json("dump", "smpt")[0]["refs"]
    with DeviceFile.open(path, dma=dma) as f:
        f.ioctl(ADD_DEVICE, block(num=16))
        serve(f, LENGTHS)
        right(machine, LENGTHS)
        counts = f.counters(0)
        assert (counts["in_bytes"], counts["out_bytes"]) == (sum(LENGTHS), sum(LENGTHS))
        by_engine = host_channel(machine)["bytes"] - before
        if dma:
            assert counts["in_bytes_dma"] >= sum(LENGTHS)
            assert counts["out_bytes_dma"] + counts["tx_dst_unaligned"] + counts["tx_len_unaligned"] == sum(
                LENGTHS
            )
            assert by_engine >= counts["in_bytes_dma"] + counts["out_bytes_dma"]
        else:
            assert (counts["in_bytes_dma"], counts["out_bytes_dma"], by_engine) == (0, 0, 0)
        info = machine.micemu("sysfs", "cat", "kernel/debug/vop1/vdev_info").stdout
        assert f"in {counts['in_bytes']} in_dma {counts['in_bytes_dma']} out {counts['out_bytes']}" in info
    assert machine.json("dump", "smpt")[0]["refs"] == mapped  # the bounce buffer went with the device


def test_vop_30_program_copies_without_dma_interrupts(machine: Machine, tmp_path: Path) -> None:
    """HW-15, VOP-30: with MSI no DMA completion is dispatched; the copies end all the same."""
    config = tmp_path / "card.toml"
    config.write_text('[[card]]\ninterrupts = "msi"\n')
    path = prepared(machine, tmp_path, "--config", str(config))
    with DeviceFile.open(path, dma=True) as f:
        f.ioctl(ADD_DEVICE, block(num=16))
        serve(f, LENGTHS)
        right(machine, LENGTHS)
        assert f.counters(0)["in_bytes_dma"]


def test_vop_32_halted_channel_fails_the_copy(machine: Machine, tmp_path: Path) -> None:
    """VOP-32: a channel that halts is EIO for the program, at once; the device goes in order, the reset mends the channel."""
    path = prepared(machine, tmp_path)
    machine.micemu("fault", "add", "mic0", "dma-fail", "--channel", "0", "--count", "1")
    with DeviceFile.open(path, dma=True) as f:
        f.ioctl(ADD_DEVICE, block(num=16))

        def refused() -> bool:
            f.poll(20)
            try:
                return moved(f, bytearray(LENGTHS[0])) < 0
            except OSError as e:
                return e.errno == errno.EIO

        eventually(refused, 20, "EIO")
    assert machine.card()["state"] == "online"
    machine.micemu("reset", "mic0")
    path = prepared(machine, tmp_path)
    with DeviceFile.open(path, dma=True) as f:
        f.ioctl(ADD_DEVICE, block(num=16))
        serve(f, LENGTHS[:1])
        assert f.counters(0)["in_bytes_dma"]

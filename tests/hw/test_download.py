"""Reset, download and boot interrupt: HW-36, 38 to 43."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from bootlab import BASE, FRESH, Lab, MiB, in_loop, open_lab
from hwcard import rang

from mic_emu import layout as L
from mic_emu._native import lib
from mic_emu.clock import ManualClock
from mic_emu.cosm.states import State
from mic_emu.errors import MicemuError
from mic_emu.host.cosm import BootRequest, CosmDevice
from mic_emu.host.driver import DownloadError

C = L.CONSTANTS
DOWNLOAD = C["SPAD_DOWNLOAD"]


# --- reset --------------------------------------------------------------------------------------------


@in_loop
async def test_hw_36_ready_is_withdrawn_before_the_reset() -> None:
    """HW-36: when RGCR bit 0 is written SPAD2 is 0 already; RGCR's other bits keep their value."""
    with open_lab() as lab:
        lab.bus.write("rgcr", 0x100)
        at_reset: list[tuple[int, int]] = []
        write = lab.bus.write

        def note(name: str, value: int, index: int = 0) -> None:
            if name == "rgcr":
                at_reset.append((value, lab.bus.read("spad", DOWNLOAD)))
            write(name, value, index)

        lab.bus.write = note  # type: ignore[method-assign]
        assert lab.driver.ready()
        await lab.driver.reset()
        assert at_reset == [(0x101, 0)]
        assert not lab.driver.ready()


@pytest.mark.parametrize(
    ("busy", "looks", "end"),
    [(0, 1, State.READY), (1, 2, State.READY), (44, 45, State.READY), (45, 45, State.RESET_FAILED)],
)
@in_loop
async def test_hw_36_ready_at_the_first_look_that_sees_it(busy: int, looks: int, end: State) -> None:
    """HW-36: ready as soon as a poll sees SPAD2 bit 0, which the 45th still may; after it reset_failed."""
    clock = ManualClock()
    with open_lab(clock=clock) as lab:
        card, seen, ready = CosmDevice(0, lab.driver, clock, lab.log), [], lab.driver.ready

        def look() -> bool:
            if len(seen) == busy:
                lab.firmware()
            seen.append(ready())
            return seen[-1]

        lab.driver.ready = look  # type: ignore[method-assign]
        resetting = asyncio.ensure_future(card.stop(force=True))
        await clock.advance(60)
        await resetting
        assert (card.state, seen) == (end, [False] * (looks - 1) + [end is State.READY])


# --- a boot that cannot be ----------------------------------------------------------------------------


async def fails(lab: Lab, card: CosmDevice) -> int:
    """errno of a boot that must fail before the boot interrupt: the card is ready, nothing stays registered."""
    before = (lab.pages.used_bytes, lab.driver.smpt.mapped_bytes)
    calls: list[str] = []

    async def note(what: str) -> None:
        calls.append(what)

    lab.driver.bring_up, lab.driver.tear_down = lambda: note("up"), lambda: note("down")
    with pytest.raises(MicemuError) as e:
        await card.boot()
    assert card.state is State.READY
    assert calls == ["up", "down"]  # SCIF and VOP
    assert lab.driver.dma is None
    assert lab.bus.read("dcr") & 0xAA == 0
    assert [row for row in lab.driver.irq.rows() if row[3]] == []
    assert (lab.pages.used_bytes, lab.driver.smpt.mapped_bytes) == before
    assert rang(lab.bus.fds[lib.MIC_FD_BOOT]) == 0
    return int(e.value.errno or 0)


def bootable(lab: Lab, firmware: str, ramdisk: str = "") -> CosmDevice:
    card = CosmDevice(0, lab.driver, lab.driver.clock, lab.log)
    card.bootmode, card.firmware, card.ramdisk = "linux", firmware, ramdisk
    return card


async def boots(lab: Lab, card: CosmDevice) -> None:
    """A correct boot."""
    await card.boot()
    assert card.state is State.BOOTING
    assert rang(lab.bus.fds[lib.MIC_FD_BOOT]) == 1
    await lab.driver.stop()


@pytest.mark.parametrize(
    ("base", "size"),
    [
        (0x8000_1000, 100),
        (0xFFFF_F000, 100),
        (64 * MiB - 4096, 4097),
        (64 * MiB, 1),
        (0, 64 * MiB + 1),
        (BASE, 64 * MiB + 1),  # unsigned, aperture - size is huge
    ],
)
@in_loop
async def test_hw_38_cosm_13_15_image_that_cannot_be_downloaded(
    base: int, size: int, image: str, tmp_path: Path
) -> None:
    """HW-38: an address above 2 GiB, or an image that does not fit: EINVAL and ready; a correct boot works then."""
    odd = tmp_path / "odd.img"
    with odd.open("wb") as f:
        f.truncate(size)
    with open_lab() as lab:
        card = bootable(lab, str(odd))
        lab.bus.hw_store("spad", base | 1, DOWNLOAD)
        assert await fails(lab, card) == errno.EINVAL
        assert lab.bus.read("spad", C["SPAD_FW_SIZE"]) == 0
        lab.firmware()
        card.firmware = image
        await boots(lab, card)


@pytest.mark.parametrize(("gddr", "base"), [(64 * MiB, 64 * MiB - 4096), (4096 * MiB, 0x8000_0000)])
@in_loop
async def test_hw_38_cosm_15_limits_are_inclusive(gddr: int, base: int, tmp_path: Path) -> None:
    """HW-38: an image that ends with the aperture is copied, and one at 2 GiB boots."""
    fits = tmp_path / "fits.img"
    fits.write_bytes(b"x" * 4096)
    with open_lab(gddr) as lab:
        card = bootable(lab, str(fits))
        lab.bus.hw_store("spad", base | 1, DOWNLOAD)
        if base + 4096 == gddr:  # the command line behind it does not fit
            assert await fails(lab, card) == errno.EINVAL
        else:
            await boots(lab, card)
        assert lab.bus.gddr.read(base, 4096) == b"x" * 4096


@pytest.mark.parametrize("what", ["firmware", "ramdisk"])
@pytest.mark.parametrize(("name", "code"), [("gone", errno.ENOENT), ("", errno.EISDIR)])
@in_loop
async def test_hw_39_cosm_13_14_missing_files(
    what: str, name: str, code: int, image: str, tmp_path: Path
) -> None:
    """HW-39: no image or ramdisk of that name: the loader's errno, and ready; the right name boots."""
    with open_lab() as lab:
        card = bootable(lab, image)
        setattr(card, what, str(tmp_path / name))
        assert await fails(lab, card) == code
        card.firmware, card.ramdisk = image, ""
        await boots(lab, card)


@pytest.mark.parametrize("what", ["firmware", "ramdisk"])
@in_loop
async def test_hw_39_no_file_at_all(what: str, image: str, tmp_path: Path) -> None:
    """HW-39: a FIFO nobody writes to, and a device without an end: an errno at once, and not a byte of them is read."""
    os.mkfifo(tmp_path / "fifo")
    with open_lab() as lab:
        for name in (str(tmp_path / "fifo"), "/dev/zero"):
            card = bootable(lab, image)
            setattr(card, what, name)
            assert await fails(lab, card) == errno.EINVAL


@pytest.mark.parametrize("what", ["firmware", "ramdisk"])
@in_loop
async def test_hw_41_what_has_no_room_is_not_read(what: str, image: str, tmp_path: Path) -> None:
    """HW-41: a file of a size that no card has is refused by its size: the host has no room for it either."""
    huge = tmp_path / "huge"
    with open(huge, "wb") as f:
        f.truncate(1 << 42)
    with open_lab() as lab:
        card = bootable(lab, image)
        setattr(card, what, str(huge))
        assert await fails(lab, card) == errno.EINVAL


@in_loop
async def test_hw_39_cosm_13_no_image_is_named() -> None:
    """HW-39: an unset name is EINVAL."""
    with open_lab() as lab:
        assert await fails(lab, bootable(lab, "")) == errno.EINVAL


# --- a good start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cmdline", ["", "quiet x=1"])
@pytest.mark.parametrize("with_ramdisk", [False, True])
@in_loop
async def test_hw_40_what_lies_where_after_a_start(
    cmdline: str, with_ramdisk: bool, image: str, tmp_path: Path
) -> None:
    """HW-40: image at B, its size in SPAD5, the command line behind it, the ramdisk at 2 B and named in the image."""
    ramdisk = tmp_path / "ramdisk"
    ramdisk.write_bytes(os.urandom(5000))
    with open_lab() as lab:
        await lab.driver.start(BootRequest("linux", image, str(ramdisk) if with_ramdisk else "", cmdline))
        want = bytearray(Path(image).read_bytes())
        if with_ramdisk:
            want[0x218:0x220] = (2 * BASE).to_bytes(4, "little") + (5000).to_bytes(4, "little")
        size, text = len(want), f" mem=64M{' ' + cmdline if cmdline else ''}".encode() + b"\0"
        assert lab.bus.gddr.read(BASE, size) == want
        assert lab.bus.read("spad", C["SPAD_FW_SIZE"]) == size
        assert lab.bus.gddr.read(BASE + size, len(text)) == text
        assert lab.bus.gddr.read(2 * BASE, 5000) == (ramdisk.read_bytes() if with_ramdisk else bytes(5000))
        await lab.driver.stop()


@in_loop
async def test_hw_42_page_address_then_apic_id_then_interrupt(image: str) -> None:
    """HW-42: at the high dword's write the device page is announced, at the low one's the APIC id; only that rings."""
    with open_lab() as lab:
        page = lab.driver.page_card
        for name in ("SPAD_DP_LO", "SPAD_DP_HI"):
            lab.bus.write("spad", 0xDEAD, C[name])  # the reset lost them
        steps: list[tuple[Any, ...]] = []
        write = lab.bus.write

        def note(name: str, value: int, index: int = 0) -> None:
            spads = [lab.bus.read("spad", C[n]) for n in ("SPAD_DP_LO", "SPAD_DP_HI")]
            write(name, value, index)
            if name.startswith("apicicr"):
                steps.append((name, index, value, spads, rang(lab.bus.fds[lib.MIC_FD_BOOT])))

        lab.bus.write = note  # type: ignore[method-assign]
        await lab.driver.start(BootRequest("linux", image, "", ""))
        spads = [page & 0xFFFFFFFF, page >> 32]
        assert steps == [("apicicr_hi", 7, 4, spads, 0), ("apicicr", 7, 0x20E5, spads, 1)]
        del lab.bus.write
        await lab.driver.stop()


@pytest.mark.parametrize("length", [2034, 2035, 5000])
@in_loop
async def test_hw_41_cosm_21_long_command_line(length: int, image: str) -> None:
    """HW-41: text beyond 2047 characters is cut and terminated; nothing behind it is written."""
    with open_lab() as lab:
        end = BASE + os.path.getsize(image) + 2048
        lab.bus.gddr.write(end, b"behind")
        await lab.driver.start(BootRequest("linux", image, "", "x" * length))
        text = (" mem=64M " + "x" * length)[:2047].encode()
        assert lab.bus.gddr.read(BASE + os.path.getsize(image), len(text) + 1) == text + b"\0"
        assert lab.bus.gddr.read(end, 6) == b"behind"
        await lab.driver.stop()


@in_loop
async def test_hw_41_ramdisk_beyond_the_aperture(image: str, tmp_path: Path) -> None:
    """HW-41: a ramdisk that does not fit is EINVAL and no boot interrupt; a smaller one boots."""
    with open_lab() as lab:
        ramdisk = tmp_path / "ramdisk"
        with open(ramdisk, "wb") as f:
            f.truncate(32 * MiB + 1)
        with pytest.raises(DownloadError) as e:
            await lab.driver.start(BootRequest("linux", image, str(ramdisk), ""))
        assert e.value.errno == errno.EINVAL
        assert lab.driver.dma is None
        os.truncate(ramdisk, MiB)
        await lab.driver.start(BootRequest("linux", image, str(ramdisk), ""))
        assert lab.bus.gddr.load(BASE + 0x218, 4) == 2 * BASE
        assert lab.bus.gddr.load(BASE + 0x21C, 4) == MiB
        await lab.driver.stop()


@in_loop
async def test_hw_43_cosm_16_flash_ends_after_the_image(image: str) -> None:
    """HW-43: bootmode flash: image and SPAD5 are written, then EINVAL; no command line, no interrupt."""
    with open_lab() as lab:
        with pytest.raises(DownloadError) as e:
            await lab.driver.start(BootRequest("flash", image, "", "words"))
        assert e.value.errno == errno.EINVAL
        size = os.path.getsize(image)
        assert lab.bus.gddr.read(BASE, size) == Path(image).read_bytes()
        assert lab.bus.read("spad", C["SPAD_FW_SIZE"]) == size
        assert lab.bus.gddr.read(BASE + size, 8) == bytes(8)
        assert lab.bus.read("apicicr", 7) == 0
        assert lab.bootparam == FRESH

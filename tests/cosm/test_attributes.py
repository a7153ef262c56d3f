"""The files of /sys/class/mic/micN, without a file system (COSM 6)."""

from __future__ import annotations

import asyncio
import errno
from types import SimpleNamespace
from typing import Any

import pytest
from lab import Lab

from mic_emu._native import ffi
from mic_emu.bar import Bus
from mic_emu.cosm.states import State
from mic_emu.errors import MicemuError
from mic_emu.host.attributes import ATTRIBUTES, PAGE
from mic_emu.host.sysfs import Sysfs, log_buffer
from mic_emu.layout import CONSTANTS as C
from mic_emu.memory import View
from mic_emu.testing.cosm import settle


async def put(lab: Lab, name: str, data: bytes) -> int:
    """errno of a write, 0 when it succeeds."""
    try:
        await ATTRIBUTES[name].write(lab.dev, data)
    except MicemuError as e:
        return e.errno
    return 0


def get(lab: Lab, name: str) -> bytes:
    return ATTRIBUTES[name].read(lab.dev)


async def test_cosm_2_initial_contents() -> None:
    """ready, nop, 1, zero addresses, and unset strings are zero bytes."""
    lab = Lab()
    assert {name: get(lab, name) for name in ATTRIBUTES} == {
        "state": b"ready\n", "shutdown_status": b"nop\n", "heartbeat_enable": b"1\n",
        "bootmode": b"", "cmdline": b"", "firmware": b"", "ramdisk": b"",
        "log_buf_addr": b"0" * 16 + b"\n", "log_buf_len": b"0" * 16 + b"\n",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["cmdline", "firmware", "ramdisk"])
@pytest.mark.parametrize(
    ("written", "read"),
    [
        (b"a b\n", b"a b\n"),
        (b"a b", b"a b\n"),
        (b"a\n\n", b"a\n\n"),
        (b" x ", b" x \n"),
        (b"\n", b"\n"),
        (b"\xff\xfe\n", b"\xff\xfe\n"),
    ],
)
async def test_cosm_4_8_one_trailing_newline_is_stripped(name: str, written: bytes, read: bytes) -> None:
    """Inner blanks and bytes are kept; names of files that do not exist are taken."""
    lab = Lab()
    assert await put(lab, name, written) == 0
    assert get(lab, name) == read


@pytest.mark.parametrize("text", [b"efi", b"Linux", b"linux ", b"", b"elf\n", b"linux\n\n"])
async def test_cosm_5_bootmode_keeps_the_old_value(text: bytes) -> None:
    """Only linux and flash; anything else EINVAL. (Nothing at all never reaches the driver.)"""
    lab = Lab()
    assert await put(lab, "bootmode", b"flash\n") == 0
    assert await put(lab, "bootmode", b"linux") == 0
    assert await put(lab, "bootmode", text) == (errno.EINVAL if text else 0)
    assert get(lab, "bootmode") == b"linux\n"


@pytest.mark.parametrize(
    ("text", "read"), [("0", "0"), ("1", "1"), ("7", "1"), ("-1", "1"), ("+5\n", "1"), ("2147483647", "1")]
)
async def test_cosm_6_heartbeat_enable_takes_integers(text: str, read: str) -> None:
    """Read back as 0 or 1."""
    lab = Lab()
    assert await put(lab, "heartbeat_enable", text.encode()) == 0
    assert get(lab, "heartbeat_enable") == f"{read}\n".encode()


@pytest.mark.parametrize(
    ("text", "number"),
    [("x", errno.EINVAL), ("1 ", errno.EINVAL), ("\n", errno.EINVAL), ("0x1", errno.EINVAL), ("--1", errno.EINVAL),
     ("1\n\n", errno.EINVAL), ("2147483648", errno.ERANGE), ("-2147483649", errno.ERANGE), ("9" * 40, errno.ERANGE)],
)  # fmt: skip
async def test_cosm_6_heartbeat_enable_refuses_the_rest(text: str, number: int) -> None:
    """Garbage EINVAL, beyond 32 bits ERANGE, the value stays."""
    lab = Lab()
    assert await put(lab, "heartbeat_enable", text.encode()) == number
    assert get(lab, "heartbeat_enable") == b"1\n"


@pytest.mark.parametrize("name", ["log_buf_addr", "log_buf_len"])
async def test_cosm_7_log_addresses_are_hexadecimal(name: str) -> None:
    """With or without 0x; garbage EINVAL; beyond 64 bits ERANGE; 16 digits when read."""
    lab = Lab()
    for text in ("ffffffff81a2b3c0", "0xFFFFFFFF81A2B3C0\n"):
        assert await put(lab, name, text.encode()) == 0
        assert get(lab, name) == b"ffffffff81a2b3c0\n"
    assert await put(lab, name, b"1f") == 0
    assert get(lab, name) == b"000000000000001f\n"
    assert await put(lab, name, b"f" * 16) == 0
    assert await put(lab, name, b"xyz") == errno.EINVAL
    assert await put(lab, name, b"-1") == errno.EINVAL
    assert await put(lab, name, b"1" + b"0" * 16) == errno.ERANGE
    assert get(lab, name) == b"f" * 16 + b"\n"


@pytest.mark.parametrize(
    "text", [b"Boot", b"boot ", b" boot", b"online", b"resetting", b"boot\n\n", b"boot\0", b"\xff", b"\n"]
)
async def test_cosm_9_state_takes_three_words_only(text: bytes) -> None:
    """Anything but boot, reset, shutdown: EINVAL, no effect."""
    lab = Lab()
    lab.dev.bootmode = "linux"
    assert await put(lab, "state", text) == errno.EINVAL
    assert lab.ops.calls == []


async def test_cosm_9_17_state_acts_with_and_without_newline() -> None:
    """echo and printf both work; the errno of the state machine reaches the writer."""
    lab = Lab()
    assert await put(lab, "state", b"boot") == errno.EINVAL
    await put(lab, "bootmode", b"linux\n")
    assert await put(lab, "state", b"boot\n") == 0
    assert get(lab, "state") == b"booting\n"
    assert await put(lab, "state", b"shutdown") == errno.EINVAL
    await lab.connect()
    assert await put(lab, "state", b"shutdown") == 0
    assert await put(lab, "state", b"reset\n") == 0


async def test_cosm_3_11_read_only_files_refuse_writing() -> None:
    """shutdown_status is 0444 and EACCES; the others are 0644."""
    lab = Lab()
    assert await put(lab, "shutdown_status", b"nop\n") == errno.EACCES
    assert {name: a.mode for name, a in ATTRIBUTES.items() if a.mode != 0o644} == {"shutdown_status": 0o444}


@pytest.mark.parametrize("state", list(State), ids=lambda s: s.name)
async def test_cosm_10_strings_may_change_in_every_state(state: State) -> None:
    """Also while online, and while a reset holds the card: nobody waits, and nothing but the file changes."""
    lab = Lab()
    await lab.goto(state)
    before = (lab.seen, list(lab.words), list(lab.ops.calls))
    texts = {"cmdline": b"quiet\n", "firmware": b"f.img\n", "ramdisk": b"r.cpio\n", "bootmode": b"flash\n"}
    for name, text in texts.items():
        assert await asyncio.wait_for(put(lab, name, text), 10) == 0
        assert get(lab, name) == text
    assert (lab.seen, lab.words, lab.ops.calls) == before
    if lab.ops.gate:
        lab.ops.gate.set()
        await settle()


async def test_contents_end_at_one_page() -> None:
    """A longer write keeps 4096 bytes, a read returns at most a page."""
    lab = Lab()
    assert await put(lab, "cmdline", b"x" * 10000) == 0
    assert len(get(lab, "cmdline")) == PAGE


@pytest.mark.parametrize(
    ("text_at", "length_at", "length", "expected"),
    [(0x100, 0x80, 5, b"hello"), (0x100, 0x80, 0, b""), (0x100, 0x80, 0xFFFFFFFF, b""), (0xFFB, 0x80, 5, b"\0" * 5),
     (0xFFC, 0x80, 5, b""), (0x100, 0xFFC, 0, b""), (0x100, 0xFFD, 0, b""), (-1, 0x80, 5, b""),
     (0x100, -4, 5, b""), (1 << 40, 0x80, 5, b"")],
)  # fmt: skip
def test_cosm_62_hw_54_log_has_exactly_the_length_words_bytes(
    text_at: int, length_at: int, length: int, expected: bytes
) -> None:
    """Both addresses are checked against the aperture; what lies outside is empty output, never a fault."""
    view = View(ffi.new("char[0x1000]"), 0x1000)
    view.write(0x100, b"hello")
    if 0 <= length_at <= 0xFFC:
        view.write(length_at, length.to_bytes(4, "little"))
    base = C["CARD_TEXT_BASE"]
    assert log_buffer(view, base + text_at, base + length_at) == expected


def card_with_a_log(lab: Lab) -> Any:
    """What ``Sysfs`` needs of a card: the state machine, and GDDR with the log ``hello``."""
    view = View(ffi.new("char[0x1000]"), 0x1000)
    view.write(0x80, b"\5\0\0\0")
    view.write(0x100, b"hello")
    lab.dev.log_buf_len, lab.dev.log_buf_addr = C["CARD_TEXT_BASE"] + 0x80, C["CARD_TEXT_BASE"] + 0x100
    return SimpleNamespace(cosm=lab.dev, bus=SimpleNamespace(gddr=view))


@pytest.mark.parametrize("state", list(State), ids=lambda s: s.name)
async def test_cosm_61_log_is_read_while_there_can_be_one(state: State) -> None:
    """booting, online and shutting_down; in the other states nothing, whatever GDDR holds."""
    lab = Lab()
    await lab.goto(state)
    has_log = state in (State.BOOTING, State.ONLINE, State.SHUTTING_DOWN)
    assert Sysfs(SimpleNamespace()).log_buf(card_with_a_log(lab)) == (b"hello" if has_log else b"")  # type: ignore[arg-type]
    if lab.ops.gate:
        lab.ops.gate.set()
        await settle()


@pytest.mark.parametrize("name", ["log_buf_addr", "log_buf_len"])
async def test_cosm_61_log_needs_both_addresses_and_is_where_they_say(name: str) -> None:
    """0 in either: empty; another address: the bytes there."""
    lab = Lab()
    await lab.online()
    card, sysfs = card_with_a_log(lab), Sysfs(SimpleNamespace())  # type: ignore[arg-type]
    assert await put(lab, "log_buf_addr", b"%x" % (lab.dev.log_buf_addr + 1)) == 0
    assert sysfs.log_buf(card) == b"ello\0"
    assert await put(lab, name, b"0") == 0
    assert sysfs.log_buf(card) == b""


def test_cosm_62_log_of_a_card_that_makes_it_up_is_empty(bar: Bus) -> None:
    """A length that lies in its memory, and is more than any log has: the host neither reads nor keeps that much."""
    base = C["CARD_TEXT_BASE"]
    for size, there in ((2 << 20, 2 << 20), ((2 << 20) + 1, 0), (bar.gddr.size - 0x1000, 0)):
        bar.gddr.store(0x80, 4, size)
        assert len(log_buffer(bar.gddr, base + 0x1000, base + 0x80)) == there

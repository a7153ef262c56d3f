"""The tools' services of a card, request by request (COSM 13.2, 13.3)."""

from __future__ import annotations

import asyncio
import struct
from typing import cast

import pytest

from mic_emu.card.os import tools
from mic_emu.card.os.tools import Ras, Settings, Systools
from mic_emu.cosm import tools_proto as P
from mic_emu.scif.kernel import POLLIN, KernelEndpoint

FACTS = P.Facts(8 << 30, 60, "micos 1", "MICEMU000001")
USER, ROOT = 1088, 1023


def systools(
    request: bytes, port: int = USER, settings: Settings | None = None
) -> tuple[tuple[int, ...], bytes]:
    got = Systools(FACTS, settings or Settings()).answer(request, port)
    return P.SYSTOOLS_HEADER.unpack_from(got)[:3], got[26:]


def request(kind: int, value: int = 0) -> bytes:
    return P.SYSTOOLS_HEADER.pack(kind, 0, 0, 0, struct.pack("<I12x", value))


def test_cosm_71_daemon_info_is_26_bytes_and_2_7() -> None:
    """Type 1: header of 26 bytes, length 2, payload {2, 7}."""
    assert P.SYSTOOLS_HEADER.size == 26
    assert systools(request(1)) == ((1, 2, 0), b"\2\7")


@pytest.mark.parametrize(("kind", "size"), [(2, 20), (3, 278), (7, 4), (9, 83), (10, 27), (11, 17), (15, 2)])
def test_cosm_71_payload_sizes_are_the_specifications(kind: int, size: int) -> None:
    """The length field and the payload agree."""
    head, payload = systools(request(kind))
    assert (head, len(payload)) == ((kind, size, 0), size)


def test_cosm_71_core_use_has_a_record_per_thread() -> None:
    """26 bytes, the sum, then 40 bytes for each CPU."""
    (_, length, error), payload = systools(request(12))
    assert (error, length) == (0, len(payload))
    assert (length - 66) % 40 == 0


@pytest.mark.parametrize("kind", [0, 4, 5, 6, 0x10, 0x11, 0x55])
def test_cosm_71_74_unknown_and_unmodelled_types_are_error_2(kind: int) -> None:
    """Header only."""
    assert systools(request(kind)) == ((kind, 0, 2), b"")


@pytest.mark.parametrize("kind", [0x82, 0x83, 0x86, 0x87])
def test_cosm_71_set_requests_need_a_privileged_port(kind: int) -> None:
    """From 1024 on: error 6, nothing is stored."""
    settings = Settings()
    assert systools(request(kind, 1), 1024, settings) == ((kind, 0, 6), b"")
    assert (settings.led, settings.turbo) == (0, 0)


def test_cosm_71_settings_are_stored_and_read_back() -> None:
    """The LED over systoolsd is the LED over RAS."""
    settings = Settings()
    assert systools(request(P.SET_LED, 1), ROOT, settings) == ((P.SET_LED, 0, 0), b"")
    assert systools(request(7), USER, settings)[1] == b"\1\0\0\0"
    assert ras(40, settings=settings)[1] == b"\1\0\0\0"


def test_cosm_71_short_request_is_error_3() -> None:
    """25 bytes."""
    assert systools(request(1)[:25])[0][2] == 3


@pytest.mark.parametrize("kind", [0x08, 0x88])
def test_cosm_75_flash_and_register_writes_change_nothing(kind: int) -> None:
    """Refused with a clear error, from root too."""
    assert systools(request(kind, 1), ROOT)[0][2] == 2


def ras(
    op: int, parm: int = 0, port: int = USER, settings: Settings | None = None
) -> tuple[tuple[int, ...], bytes]:
    got = Ras(FACTS, settings or Settings()).answer(P.RAS_HEADER.pack(op, 0, parm, 77, 0), port)
    return P.RAS_HEADER.unpack_from(got)[:4], got[24:]


def test_cosm_72_hardware_info() -> None:
    """Op 1: command 0x4001, length 35, the stamp comes back."""
    head, body = ras(1)
    assert (head, len(body)) == ((0x4001, 35, 0, 77), 35)


@pytest.mark.parametrize(("op", "size"), [(2, 840), (10, 4), (13, 28), (21, 4), (25, 4), (30, 12), (34, 8)])
def test_cosm_72_lengths_are_those_of_the_structures(op: int, size: int) -> None:
    """A client fails when they differ."""
    head, body = ras(op)
    assert (head[0], head[1], len(body)) == (op | 0x4000, size, size)


@pytest.mark.parametrize(("op", "code"), [(0, 1), (49, 1), (999, 1), (18, 9), (3, 9)])
def test_cosm_72_errors_have_both_bits_and_a_record(op: int, code: int) -> None:
    """Unknown: 1; known but not modelled: 9."""
    head, body = ras(op)
    assert (head[0], head[1], body) == (op | 0xC000, 4, struct.pack("<HH", code, 0))


def test_cosm_72_setting_needs_a_privileged_port() -> None:
    """Error 5 for others."""
    assert ras(26, 1, USER)[1] == struct.pack("<HH", 5, 0)
    settings = Settings()
    assert ras(26, 1, ROOT, settings) == ((26 | 0x4000, 0, 1, 77), b"")
    assert settings.turbo == 1


def test_every_fixed_structure_has_the_specifications_size() -> None:
    """Packed, little endian."""
    sizes = [
        P.DEVICE_INFO_BODY,
        P.MEMORY_INFO_BODY,
        P.PROCESSOR_BODY,
        P.CORES_BODY,
        P.RAS_HEADER,
        P.RAS_HARDWARE_BODY,
    ]
    assert [s.size for s in sizes] == [278, 83, 27, 17, 24, 35]
    assert P.CORE_USE_HEAD.size + P.CORE_USE_ROW.size == 66


def test_client_that_takes_no_answer_is_hung_up_on() -> None:
    """It does not keep its place among the few that are served."""
    closed = False

    class Client:
        peer = (0, USER)

        async def poll(self, events: int, limit_s: float) -> int:
            assert limit_s == tools.IDLE_S
            return events & POLLIN

        def mask(self) -> int:
            return 0

        def recv_nowait(self, size: int) -> bytes:
            return request(1)

        def send_nowait(self, data: bytes) -> int:
            return 0

        async def close(self) -> None:
            nonlocal closed
            closed = True

    async def main() -> None:
        served = tools.ToolServers.__new__(tools.ToolServers)
        served._clients = {}
        await asyncio.wait_for(served._serve(cast(KernelEndpoint, Client()), Systools(FACTS, Settings())), 20)
        assert closed
        assert list(served._clients.values()) == [0]

    asyncio.run(main())

"""Messages of the tools' services on a card: systoolsd (port 130) and RAS (port 100) (COSM 13.2, 13.3)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

SYSTOOLS_PORT, RAS_PORT = 130, 100
SYSTOOLS_VERSION = (2, 7)
PRIVILEGED_END = 1024

# systoolsd: type, payload length, card error, extra, inline data
SYSTOOLS_HEADER = struct.Struct("<HHHI16s")
INFO, MEMORY_USE, DEVICE_INFO, DIAGNOSTICS, MEMORY_INFO, PROCESSOR, CORES, CORE_USE, TURBO = (
    0x01, 0x02, 0x03, 0x07, 0x09, 0x0A, 0x0B, 0x0C, 0x0F,
)  # fmt: skip
SET_LED, SET_TURBO = 0x83, 0x86
FIRST_SET = 0x80
E_UNSUPPORTED, E_STRUCTURE, E_BUSY, E_PRIVILEGE = 2, 3, 5, 6
DEVICE_INFO_BODY = struct.Struct("<9I64s64s64s16s16s6s12s")
MEMORY_INFO_BODY = struct.Struct("<4IB64sH")
PROCESSOR_BODY = struct.Struct("<IHHHB16s")
CORES_BODY = struct.Struct("<4IB")
MEMORY_USE_BODY = struct.Struct("<5I")
CORE_USE_HEAD = struct.Struct("<QQIHI")
CORE_USE_ROW = struct.Struct("<5Q")

# RAS: command, length, parameter, stamp, time spent
RAS_HEADER = struct.Struct("<HHIQQ")
RAS_RESPONSE, RAS_ERROR = 0x4000, 0x8000
RAS_HARDWARE, RAS_VERSIONS, RAS_CORES, RAS_MEMORY_DEVICE, RAS_MEMORY, RAS_API = 1, 2, 10, 13, 30, 34
RAS_HARDWARE_BODY = struct.Struct("<16s7B12s")
RAS_ERROR_BODY = struct.Struct("<HH")
RAS_BAD_OP, RAS_BAD_LENGTH, RAS_PERMISSION, RAS_NO_VALUE = 1, 2, 5, 9
RAS_OPS = range(1, 49)


@dataclass(frozen=True)
class Facts:
    """The fixed data of a 5110P and what this card has."""

    memory_bytes: int
    cores: int
    os_version: str
    serial: str
    stepping: str = "C0"
    frequency_khz: int = 1_053_000
    threads_per_core: int = 4
    memory_kt_per_s: int = 5_000_000
    memory_vendor: str = "Elpida"
    memory_type: int = 1  # GDDR5
    flash_version: str = "2.1.02.0391"
    part_number: str = "BC31S1P-micemu"


def text(value: str, size: int) -> bytes:
    """A fixed field with at least one zero byte."""
    return value.encode()[: size - 1].ljust(size, b"\0")

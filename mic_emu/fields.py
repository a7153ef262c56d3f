"""Registers, status bytes and features in words: what ``micemu dump`` shows beside the raw value (HW 2 to 5, VOP 2, 4).

``FIELDS`` has the parts of each register that means more than one number. A bit is shown when it is set, a
number always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mic_emu.layout import CONSTANTS as C

Value = int | bool | str


@dataclass(frozen=True)
class Part:
    """Bits ``low`` to ``low + width - 1`` of a register, as a flag (width 0) or through ``show``."""

    name: str
    low: int
    width: int = 0
    show: Callable[[int], Value] = int

    def get(self, word: int) -> Value:
        """Its value."""
        if not self.width:
            return bool(word >> self.low & 1)
        return self.show(word >> self.low & (1 << self.width) - 1)


def _bit(mask: int) -> int:
    return mask.bit_length() - 1


def _flag(name: str, constant: str) -> Part:
    return Part(name, _bit(C[constant]))


def _sources(mask: int) -> str:
    """Interrupt sources (HW 4.2) of a bitmap."""
    words = [f"db{i}" for i in range(C["SRC_DOORBELLS"]) if mask >> C["SRC_DOORBELL"] + i & 1]
    words += [f"dma{i}" for i in range(C["SRC_DMAS"]) if mask >> C["SRC_DMA"] + i & 1]
    words += ["err"] if mask >> C["SRC_ERR"] & 1 else []
    return " ".join(words)


def _channels(word: int) -> str:
    """DCR: ``0h+``: channel 0 is the host's and enabled; ``c`` the card's, ``-`` disabled."""
    return " ".join(
        f"{c}{'h' if word >> 2 * c & 1 else 'c'}{'+' if word >> 2 * c & 2 else '-'}"
        for c in range(C["DMA_CHANNELS"])
    )


def _errors(word: int) -> str:
    names = {v: k.removeprefix("DMA_ERR_").lower() for k, v in C.items() if k.startswith("DMA_ERR_")}
    return " ".join(name for bit, name in names.items() if word & bit)


def _ascii(word: int) -> str:
    return "".join(chr(b) if 32 <= b < 127 else "." for b in word.to_bytes(2, "little"))


def _vectors(mask: int) -> str:
    return " ".join(str(v) for v in range(32) if mask >> v & 1)


_SOURCES = (Part("sources", 0, 32, _sources),)
FIELDS: dict[str, tuple[Part, ...]] = {
    "postcode": (Part("code", 0, 16, _ascii),),
    "smpt": (Part("host_address", 2, 30, lambda v: v << C["SMPT_SHIFT"]),),
    "rgcr": (_flag("reset", "RGCR_RESET"),),
    "msix_ctrl": (Part("masked", 0),),
    "msix_pba": (Part("pending", 0, 16, _vectors),),
    **dict.fromkeys(("sicr0", "sice0", "sicc0", "siac0", "mxar"), _SOURCES),
    "dcar": (_flag("mask_card", "DMA_DCAR_IM0"), _flag("mask_host", "DMA_DCAR_IM1"), _flag("status", "DMA_DCAR_IS0")),
    "drar_hi": (
        Part("address_high", 0, C["DMA_DRAR_SIZE_SHIFT"]), Part("size", C["DMA_DRAR_SIZE_SHIFT"], 17),
        Part("smpt", C["DMA_DRAR_SMPT_SHIFT"], 5), _flag("system", "DMA_DRAR_SYS"),
    ),
    "dstat": (
        Part("count", 0, C["DMA_DSTAT_COUNT"].bit_length()), _flag("active", "DMA_DSTAT_ACTIVE"),
        _flag("halted", "DMA_DSTAT_QUIESCED"), _flag("error", "DMA_DSTAT_ERROR"),
    ),
    "dcherr": (Part("errors", 0, 32, _errors),),
    "dcr": (Part("channels", 0, 2 * C["DMA_CHANNELS"], _channels),),
    "apicicr": (Part("vector", 0, 8), _flag("send", "APICICR_SEND")),
    "sdbic": (_flag("request", "SDBIC_REQUEST"),),
}  # fmt: skip
SPADS: dict[int, tuple[Part, ...]] = {
    C["SPAD_DOWNLOAD"]: (
        Part("ready", _bit(C["DOWNLOAD_READY"])),
        Part("apic_id", C["DOWNLOAD_APIC_SHIFT"], C["DOWNLOAD_APIC_MASK"].bit_length()),
        Part("address", 0, 32, lambda v: v & C["DOWNLOAD_ADDR_MASK"]),
    ),
    C["SPAD_FW_SIZE"]: (Part("image_bytes", 0, 32),),
    C["SPAD_DP_LO"]: (Part("device_page_low", 0, 32),),
    C["SPAD_DP_HI"]: (Part("device_page_high", 0, 32),),
}
"""The scratchpads that have a meaning (HW 2)."""


def decode(name: str, value: int) -> dict[str, Value]:
    """Parts of a register by its name in the table (``dcar[3]``, ``dcr``); empty when it is one plain number."""
    base, _, index = name.partition("[")
    parts = SPADS.get(int(index.rstrip("]")), ()) if base == "spad" else FIELDS.get(base, ())
    return {part.name: part.get(value) for part in parts}


# --- virtio ----------------------------------------------------------------------------------------

STATUS = ("ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK", "NEEDS_RESET", "FAILED")
KINDS = {v: k.removeprefix("VIRTIO_ID_").lower() for k, v in C.items() if k.startswith("VIRTIO_ID_")}


def status_words(status: int) -> list[str]:
    """Bits of the virtio status byte (VOP-10)."""
    return [name.lower() for name in STATUS if status & C[f"VIRTIO_{name}"]]


def device_type(kind: int) -> str:
    """A device type in a word."""
    return {0: "end", -1: "removed"}.get(kind, KINDS.get(kind, f"type {kind}"))


def feature_words(kind: int, bits: int) -> list[str]:
    """Names of feature bits of a device of that type; numbers of those without one."""
    found = []
    for bit in range(64):
        if bits >> bit & 1:
            found.append(_FEATURES.get((kind, bit)) or _FEATURES.get((0, bit)) or f"bit {bit}")
    return found


def _feature_names() -> dict[tuple[int, int], str]:
    """(type, bit) to name, type 0: of every device; from the table of constants."""
    prefixes = {
        0: "VIRTIO_F_",
        **{k: f"VIRTIO_{'BLK' if name == 'block' else name.upper()}_F_" for k, name in KINDS.items()},
    }
    return {
        (kind, C[n]): n.removeprefix(p).lower() for kind, p in prefixes.items() for n in C if n.startswith(p)
    }


_FEATURES = _feature_names()


def words(fields: dict[str, Any]) -> str:
    """Decoded parts in one line: flags by name when set, numbers with theirs."""
    shown = []
    for name, value in fields.items():
        if value is True:
            shown.append(name)
        elif value is False or value == "":
            continue
        else:
            shown.append(f"{name} {value:#x}" if isinstance(value, int) and value > 9 else f"{name} {value}")
    return ", ".join(shown)

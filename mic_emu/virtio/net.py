"""virtio-net: features, configuration space, and the native loops as Python objects (VOP 8.5, 9.2)."""

from __future__ import annotations

import errno
import ipaddress
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.netif import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO, Tap, parse_mac

_C = layout.CONSTANTS


def bit(name: str) -> int:
    """Mask of feature ``name`` as in layout.py: ``NET_F_CSUM``, ``F_VERSION_1``."""
    return int(1 << _C[f"VIRTIO_{name}"])


def _bits(*names: str) -> int:
    return sum(bit(n) for n in names)


COMPAT_FEATURES = _bits(
    "NET_F_CSUM", "NET_F_GSO", "NET_F_GUEST_TSO4", "NET_F_GUEST_TSO6", "NET_F_GUEST_ECN"
)  # 0x3C1, VOP-58
"""What the stock backend offered."""

MODERN_FEATURES = _bits(
    "NET_F_CSUM", "NET_F_GUEST_CSUM", "NET_F_MTU", "NET_F_MAC", "NET_F_GUEST_TSO4", "NET_F_GUEST_TSO6",
    "NET_F_GUEST_ECN", "NET_F_HOST_TSO4", "NET_F_HOST_TSO6", "NET_F_HOST_ECN", "NET_F_MRG_RXBUF",
    "NET_F_STATUS", "F_INDIRECT_DESC", "F_EVENT_IDX", "F_VERSION_1",
)  # fmt: skip
"""What ours offers when both halves are ours."""

STATUS_LINK_UP = 1
MTU = 1500


def offered_features(personality: str, *, offload: bool = True) -> int:
    """Host feature bits of ``personality``: ``compat`` or ``modern``.

    ``offload`` False (the host's end is a responder): no segmentation towards the host.
    """
    if personality == "compat":
        return COMPAT_FEATURES
    features = MODERN_FEATURES
    if not offload:
        features &= ~_bits("NET_F_HOST_TSO4", "NET_F_HOST_TSO6", "NET_F_HOST_ECN")
    return features


def accepted_features(offered: int) -> int:
    """What our card driver takes of what is offered: all it knows, with the dependencies of virtio 1.x
    (GUEST_TSO* wants GUEST_CSUM, HOST_TSO* wants CSUM) where the device is a modern one."""
    known = COMPAT_FEATURES | MODERN_FEATURES
    features = offered & known
    if features & bit("F_VERSION_1"):
        features &= ~bit("NET_F_GSO")
        if not features & bit("NET_F_GUEST_CSUM"):
            features &= ~_bits("NET_F_GUEST_TSO4", "NET_F_GUEST_TSO6", "NET_F_GUEST_ECN")
        if not features & bit("NET_F_CSUM"):
            features &= ~_bits("NET_F_HOST_TSO4", "NET_F_HOST_TSO6", "NET_F_HOST_ECN")
    return features


def pack_config(mac: str, *, mtu: int = MTU, link_up: bool = True) -> bytes:
    """The 12-byte configuration space of the modern personality (VOP 9.2)."""
    return layout.NET_CONFIG.pack(
        mac=parse_mac(mac), status=STATUS_LINK_UP if link_up else 0, max_pairs=1, mtu=mtu
    )


def header_length(features: int) -> int:
    """Bytes of vnet header in front of each frame: 12 with MRG_RXBUF or VERSION_1, else 10."""
    return 12 if features & _bits("NET_F_MRG_RXBUF", "F_VERSION_1") else 10


def _tun_flags(features: int, csum: str, tso4: str, tso6: str, ecn: str) -> int:
    flags = TUN_F_CSUM if features & bit(csum) else 0
    for name, flag in ((tso4, TUN_F_TSO4), (tso6, TUN_F_TSO6)):
        if features & bit(name):
            flags |= TUN_F_CSUM | flag  # segmentation needs the checksum to be left open
    if flags & (TUN_F_TSO4 | TUN_F_TSO6) and features & bit(ecn):
        flags |= TUN_F_TSO_ECN
    return flags


def host_offload(features: int) -> int:
    """TUNSETOFFLOAD flags of the host's TAP: what may be delivered to the card."""
    flags = _tun_flags(
        features, "NET_F_GUEST_CSUM", "NET_F_GUEST_TSO4", "NET_F_GUEST_TSO6", "NET_F_GUEST_ECN"
    )
    return flags | (TUN_F_UFO if features & bit("NET_F_GUEST_UFO") else 0)


def card_offload(features: int) -> int:
    """TUNSETOFFLOAD flags of the card's TAP: what the device takes. Legacy GSO means any segmentation."""
    flags = _tun_flags(features, "NET_F_CSUM", "NET_F_HOST_TSO4", "NET_F_HOST_TSO6", "NET_F_HOST_ECN")
    if features & bit("NET_F_GSO") and features & bit("NET_F_CSUM"):
        flags |= TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
    return flags


def host_address(card: int) -> str:
    """Host's interface address towards card ``card`` (0..), with prefix (VOP-59)."""
    return f"172.31.{card + 1}.254/24"


def card_address(card: int) -> str:
    """Card's interface address, with prefix (VOP-59)."""
    return f"172.31.{card + 1}.1/24"


def prepare_tap(tap: Tap, features: int, *, card: bool) -> None:
    """Header length and offloads of one side's TAP for the negotiated features."""
    tap.set_header(header_length(features))
    tap.set_offload(card_offload(features) if card else host_offload(features))


@dataclass(frozen=True, slots=True)
class NetStats:
    """Counters of one half; drops are frames that could not be delivered."""

    to_card_packets: int
    to_card_bytes: int
    to_card_drops: int
    from_card_packets: int
    from_card_bytes: int
    from_card_drops: int
    sleeps: int


def _net_stats(call: Any, ptr: Any) -> NetStats:
    s = ffi.new("struct mic_net_stats *")
    call(ptr, s)
    return NetStats(
        s.to_card_packets, s.to_card_bytes, s.to_card_drops,
        s.from_card_packets, s.from_card_bytes, s.from_card_drops, s.sleeps,
    )  # fmt: skip


def _created(ptr: Any, what: str) -> Any:
    if not ptr:
        err = ffi.errno
        raise OSError(err, f"{what}: {os.strerror(err)}")
    return ptr


class _Native:
    """A native object that is destroyed once."""

    _destroy: Any
    ptr: Any

    def close(self) -> None:
        """Destroy; the object is useless afterwards."""
        if self.ptr:
            type(self)._destroy(self.ptr)
            self.ptr = ffi.NULL

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, t: type[BaseException] | None, v: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class PingResult:
    """One ping of several requests: how many were sent, and the round trips that came back."""

    sent: int
    rtts_s: tuple[float, ...]

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        return self.sent - len(self.rtts_s)


class Responder(_Native):
    """The user-space network of one side, where no TAP may be had.

    Answers ARP, ICMP, UDP and TCP echo (port 7) for ``address`` (``a.b.c.d/prefix``); with ``lease``
    it also hands that address out by DHCP.
    """

    _destroy = staticmethod(lib.mic_resp_destroy)

    def __init__(self, mac: str, address: str, lease: str | None = None) -> None:
        a = ipaddress.IPv4Interface(address)
        self.mac, self.address = mac, a
        lease_ip = int(ipaddress.IPv4Interface(lease).ip) if lease else 0
        self.ptr = _created(
            lib.mic_resp_create(parse_mac(mac), int(a.ip), int(a.netmask), lease_ip), "network responder"
        )

    def ping(
        self,
        target: str,
        count: int = 3,
        *,
        interval_s: float = 1.0,
        timeout_s: float = 1.0,
        payload: int = 56,
    ) -> PingResult:
        """Ping ``target`` while the device loop runs in another thread.

        Waits ``timeout_s`` after the last request. Raises OSError EBUSY (another ping runs), EINVAL.
        """
        rtts = ffi.new("uint64_t[]", max(count, 1))
        ip = int(ipaddress.IPv4Address(target))
        got = lib.mic_resp_ping(
            self.ptr, ip, count, int(interval_s * 1000), int(timeout_s * 1000), payload, rtts
        )
        if got < 0:
            raise OSError(-got, f"ping {target}: {os.strerror(-got)}")
        return PingResult(count, tuple(r / 1e9 for r in rtts if r))

    def input(self, frame: bytes, csum_ok: bool = False) -> None:
        """Give it one Ethernet frame."""
        lib.mic_resp_input(self.ptr, frame, len(frame), csum_ok)

    def output(self) -> bytes:
        """Take its next frame; empty when there is none."""
        buf = ffi.new("uint8_t[]", 1514)
        n = lib.mic_resp_output(self.ptr, buf, 1514)
        return bytes(ffi.buffer(buf, n))

    @property
    def poll_fd(self) -> int:
        """Readable when ``output`` has something, or a timer is due."""
        return int(lib.mic_resp_poll_fd(self.ptr))

    def stats(self) -> dict[str, int]:
        """Counters by name."""
        s = ffi.new("struct mic_resp_stats *")
        lib.mic_resp_stats(self.ptr, s)
        return {name: int(getattr(s, name)) for name, _ in ffi.typeof("struct mic_resp_stats").fields}


class Capture:
    """A pcap file being written. ``fd`` stays the caller's and stays open until ``close``."""

    def __init__(self, fd: int, buffer: int = 8 << 20) -> None:
        self.ptr = _created(lib.mic_pcap_create(fd, buffer), "capture")
        self._last = ffi.new("struct mic_pcap_stats *")

    def stats(self) -> dict[str, int]:
        """``captured``, ``written``, ``dropped`` records, and ``error`` (errno, 0 = none)."""
        s = self._last
        if self.ptr:
            lib.mic_pcap_stats(self.ptr, s)
        return {"captured": s.captured, "written": s.written, "dropped": s.dropped, "error": s.error}

    def close(self, flush_s: float = 2.0) -> dict[str, int]:
        """Write what is buffered, for at most ``flush_s`` seconds; returns the final ``stats``.

        What went wrong with the file is in ``error`` (ETIMEDOUT: not all of it in time). Never raises.
        """
        if self.ptr:
            ptr, self.ptr = self.ptr, ffi.NULL
            lib.mic_pcap_destroy(ptr, int(flush_s * 1000), self._last)
        return self.stats()


class NetDevice(_Native):
    """Device half, in a backend process. ``vdev`` is a ``struct mic_vdev *`` with two rings.

    The local end is a TAP's (or SEQPACKET socket's) descriptor, or a Responder; it stays the caller's.
    """

    _destroy = staticmethod(lib.mic_net_dev_destroy)

    def __init__(self, vdev: Any, local: int | Responder) -> None:
        self._keep = (vdev, local)
        fd, resp = (local, ffi.NULL) if isinstance(local, int) else (-1, local.ptr)
        self.ptr = _created(lib.mic_net_dev_create(vdev, fd, resp), "network device")

    def run(self) -> int:
        """Serve until a decision is needed: a MIC_RUN_* number. Raises OSError on an unknown failure."""
        rc: int = lib.mic_net_dev_run(self.ptr)
        if rc < 0:
            raise OSError(-rc, f"network device: {os.strerror(-rc)}")
        return rc

    @property
    def error(self) -> int:
        """errno of the local end after MIC_RUN_LOCAL."""
        return int(lib.mic_net_dev_error(self.ptr))

    def accepted(self, features: int) -> None:
        """What the card took of the offered features; before a run, when the rings were set up."""
        lib.mic_net_dev_accepted(self.ptr, features)

    def capture(self, cap: Capture | None) -> None:
        """Copy every frame to ``cap`` from now on, or stop; between two runs."""
        lib.mic_net_dev_capture(self.ptr, cap.ptr if cap else ffi.NULL)

    def stats(self) -> NetStats:
        """Counters."""
        return _net_stats(lib.mic_net_dev_stats, self.ptr)


def driver_area(features: int, num: int = 128, mtu: int = MTU) -> int:
    """Bytes of GDDR that ``NetDriver`` wants for its buffers."""
    return int(lib.mic_net_drv_area(features, num, mtu))


class NetDriver(_Native):
    """Driver half, in the card OS. ``vdrv`` is a ``struct mic_vdrv *`` whose two rings are set up.

    ``area``, ``length``: GDDR for the buffers (card physical address, bytes), see ``driver_area``.
    """

    _destroy = staticmethod(lib.mic_net_drv_destroy)

    def __init__(self, vdrv: Any, local: int | Responder, area: int, length: int, mtu: int = MTU) -> None:
        self._keep = (vdrv, local)
        fd, resp = (local, ffi.NULL) if isinstance(local, int) else (-1, local.ptr)
        self.ptr = _created(lib.mic_net_drv_create(vdrv, fd, resp, area, length, mtu), "network driver")

    def run(self) -> int:
        """Run until stopped (MIC_RUN_CONTROL) or the local end fails (MIC_RUN_LOCAL).

        Raises OSError EIO when the device broke a ring.
        """
        rc: int = lib.mic_net_drv_run(self.ptr)
        if rc < 0:
            raise OSError(
                -rc, "network driver: the device broke a ring" if rc == -errno.EIO else "network driver"
            )
        return rc

    @property
    def error(self) -> int:
        """errno of the local end after MIC_RUN_LOCAL."""
        return int(lib.mic_net_drv_error(self.ptr))

    def stats(self) -> NetStats:
        """Counters."""
        return _net_stats(lib.mic_net_drv_stats, self.ptr)

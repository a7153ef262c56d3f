"""Network interfaces by ioctl: TAPs, addresses, state. Needs no ``ip`` program.

Everything acts on the network namespace of the calling process.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import secrets
import socket
import struct
from types import TracebackType

from mic_emu._native import ffi, lib

IFNAMSIZ = 16

_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_SIOCADDRT = 0x890B
_RTF_UP, _RTF_GATEWAY = 1, 2
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCSIFADDR, _SIOCSIFNETMASK = 0x8916, 0x891C
_SIOCGIFMTU, _SIOCSIFMTU = 0x8921, 0x8922
_SIOCGIFHWADDR, _SIOCSIFHWADDR = 0x8927, 0x8924
_IFF_UP = 1
_ARPHRD_ETHER = 1

# What a TAP may hand us (TUNSETOFFLOAD).
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO = 1, 2, 4, 8, 16


class NetError(OSError):
    """An interface or namespace could not be set up; the message names it and says what to do."""


_TAP_HELP = {
    errno.ENOENT: "load the tun module (modprobe tun), or give the container --device /dev/net/tun",
    errno.ENODEV: "load the tun module (modprobe tun)",
    errno.ENXIO: "load the tun module (modprobe tun)",
    errno.EACCES: "make /dev/net/tun accessible to this user (chmod 666 /dev/net/tun, as most distributions do)",
    errno.EPERM: "run with CAP_NET_ADMIN, or let user namespaces be created (micemu doctor)",
    errno.EBUSY: "an interface of this name is in use and was not touched: remove it, or use --net ns",
    errno.EEXIST: "an interface of this name is in use and was not touched: remove it, or use --net ns",
    errno.EINVAL: "an interface of this name is there, is no TAP and was not touched: remove it, or use --net ns",
    errno.ENAMETOOLONG: f"a name has 1 to {IFNAMSIZ - 1} bytes",
    errno.ENOSPC: "raise the limits user.max_user_namespaces and user.max_net_namespaces (sysctl)",
}


def tap_error(err: int, what: str) -> NetError:
    """The exception for a failed step, with one sentence of help."""
    fix = _TAP_HELP.get(err)
    return NetError(err, f"{what}: {os.strerror(err)}" + (f"; {fix}" if fix else ""))


class Tap:
    """An open TAP with a vnet header; the interface lives as long as the descriptor.

    ``fd`` is non-blocking. Context manager.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name

    def set_header(self, length: int) -> None:
        """Length of the vnet header in bytes: 10 (legacy) or 12."""
        fcntl.ioctl(self.fd, _TUNSETVNETHDRSZ, struct.pack("=i", length))

    def set_offload(self, flags: int) -> None:
        """What the kernel may leave to us when it sends: TUN_F_* bits. Unknown ones raise EINVAL."""
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, flags)

    def close(self) -> None:
        """Close; the interface disappears."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self, t: type[BaseException] | None, v: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def open_tap(name: str, *, header: int = 12, offload: int = 0) -> Tap:
    """Create TAP ``name`` in the current network namespace.

    An interface of that name is never touched: EBUSY or EEXIST. Raises NetError.
    """
    if exists(name):
        raise tap_error(errno.EEXIST, f"TAP {name}")
    step = ffi.new("int *")
    fd = lib.mic_netns_tap(-1, -1, name.encode(), step)
    if fd < 0:
        raise tap_error(-fd, "/dev/net/tun" if step[0] == lib.MIC_NETNS_OPEN else f"TAP {name}")
    tap = Tap(fd, name)
    try:
        tap.set_header(header)
        tap.set_offload(offload)
    except OSError as e:
        tap.close()
        raise tap_error(e.errno or errno.EIO, f"TAP {name}") from None
    return tap


def exists(name: str) -> bool:
    """Is there an interface of this name in the current namespace?"""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _ifreq(name: str, payload: bytes = b"") -> bytes:
    raw = name.encode()
    if not 0 < len(raw) < IFNAMSIZ:
        raise tap_error(errno.ENAMETOOLONG, f"interface {name!r}")
    return struct.pack(f"{IFNAMSIZ}s24s", raw, payload)


def _request(code: int, name: str, payload: bytes = b"") -> bytes:
    """One interface ioctl; returns the answer's union (24 bytes)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        try:
            return bytes(fcntl.ioctl(s.fileno(), code, _ifreq(name, payload)))[IFNAMSIZ:]
        except NetError:
            raise
        except OSError as e:
            raise NetError(e.errno, f"interface {name}: {e.strerror}") from None


def _sockaddr(address: ipaddress.IPv4Address) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, address.packed)


def set_address(name: str, address: str) -> None:
    """Give ``name`` its IPv4 address, ``a.b.c.d/prefix``. Raises NetError."""
    a = ipaddress.IPv4Interface(address)
    _request(_SIOCSIFADDR, name, _sockaddr(a.ip))
    _request(_SIOCSIFNETMASK, name, _sockaddr(a.netmask))


def set_up(name: str, up: bool = True) -> None:
    """Administrative state. Raises NetError."""
    (flags,) = struct.unpack_from("=h", _request(_SIOCGIFFLAGS, name))
    flags = flags | _IFF_UP if up else flags & ~_IFF_UP
    _request(_SIOCSIFFLAGS, name, struct.pack("=h", flags))


def set_mtu(name: str, mtu: int) -> None:
    """MTU in bytes. Raises NetError."""
    _request(_SIOCSIFMTU, name, struct.pack("=i", mtu))


def get_mtu(name: str) -> int:
    """MTU in bytes. Raises NetError."""
    return int(struct.unpack_from("=i", _request(_SIOCGIFMTU, name))[0])


def set_mac(name: str, mac: str) -> None:
    """Hardware address, while the interface is down. Raises NetError."""
    _request(_SIOCSIFHWADDR, name, struct.pack("=H6s", _ARPHRD_ETHER, parse_mac(mac)))


def get_mac(name: str) -> str:
    """Hardware address. Raises NetError."""
    return format_mac(_request(_SIOCGIFHWADDR, name)[2:8])


def configure(
    name: str, *, address: str | None = None, mac: str | None = None, mtu: int | None = None
) -> None:
    """Set what is given, then bring the interface up. Raises NetError."""
    if mac is not None:
        set_mac(name, mac)
    if mtu is not None:
        set_mtu(name, mtu)
    if address is not None:
        set_address(name, address)
    set_up(name)


def add_default_route(gateway: str) -> None:
    """IPv4 default route through ``gateway`` in the current network namespace. Raises NetError."""
    # struct rtentry of LP64: pad, destination, gateway, mask, flags; the rest is zero (120 bytes).
    any_ = _sockaddr(ipaddress.IPv4Address(0))
    flags = _RTF_UP | _RTF_GATEWAY
    entry = struct.pack("=8x16s16s16sH62x", any_, _sockaddr(ipaddress.IPv4Address(gateway)), any_, flags)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        try:
            fcntl.ioctl(s.fileno(), _SIOCADDRT, entry)
        except OSError as e:
            raise NetError(e.errno, f"default route through {gateway}: {e.strerror}") from None


def forward_ipv4() -> None:
    """Let the current network namespace route between its interfaces. Raises OSError."""
    with open("/proc/sys/net/ipv4/ip_forward", "w") as f:
        f.write("1")


def loopback_up() -> None:
    """``lo`` up: it is down in a new namespace. Raises NetError."""
    set_up("lo")


def parse_mac(text: str) -> bytes:
    """``02:00:00:00:00:01`` as six bytes. Raises ValueError."""
    raw = bytes.fromhex(text.replace(":", ""))
    if len(raw) != 6:
        raise ValueError(f"{text!r} is no MAC address")
    return raw


def format_mac(raw: bytes) -> str:
    """Six bytes as ``02:00:00:00:00:01``."""
    return raw.hex(":")


def random_mac() -> str:
    """A locally administered unicast address."""
    return format_mac(b"\x02" + secrets.token_bytes(5))

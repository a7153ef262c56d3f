"""Small packet builder and reader for the responder's tests: an implementation apart from the C one."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

ME, PEER = "02:00:00:00:00:aa", "02:00:00:00:00:fe"
MY_IP, PEER_IP = "172.31.1.1", "172.31.1.254"
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ip(text: str) -> bytes:
    return ipaddress.IPv4Address(text).packed


def checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def eth(payload: bytes, kind: int, dst: str = PEER, src: str = ME) -> bytes:
    return mac(dst) + mac(src) + struct.pack(">H", kind) + payload


def arp(op: int = 1, target: str = PEER_IP, sender: str = MY_IP, dst: str = "ff:ff:ff:ff:ff:ff") -> bytes:
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, op) + mac(ME) + ip(sender) + bytes(6) + ip(target)
    return eth(body, 0x0806, dst)


def ipv4(
    proto: int, payload: bytes, *, src: str = MY_IP, dst: str = PEER_IP, frag: int = 0, dst_mac: str = PEER
) -> bytes:
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, frag, 64, proto, 0, ip(src), ip(dst))
    head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
    return eth(head + payload, 0x0800, dst_mac)


def icmp(kind: int, ident: int, seq: int, data: bytes) -> bytes:
    body = struct.pack(">BBHHH", kind, 0, 0, ident, seq) + data
    return ipv4(1, body[:2] + struct.pack(">H", checksum(body)) + body[4:])


def pseudo(proto: int, length: int, src: str, dst: str) -> bytes:
    return ip(src) + ip(dst) + struct.pack(">BBH", 0, proto, length)


def udp(
    sport: int, dport: int, data: bytes, *, src: str = MY_IP, dst: str = PEER_IP, dst_mac: str = PEER
) -> bytes:
    body = struct.pack(">HHHH", sport, dport, 8 + len(data), 0) + data
    body = body[:6] + struct.pack(">H", checksum(pseudo(17, len(body), src, dst) + body)) + body[8:]
    return ipv4(17, body, src=src, dst=dst, dst_mac=dst_mac)


def tcp(
    sport: int,
    seq: int,
    ack: int,
    flags: int,
    data: bytes = b"",
    *,
    dport: int = 7,
    wnd: int = 65535,
    opts: bytes = b"",
) -> bytes:
    body = struct.pack(
        ">HHIIBBHHH",
        sport,
        dport,
        seq & 0xFFFFFFFF,
        ack & 0xFFFFFFFF,
        (20 + len(opts)) // 4 << 4,
        flags,
        wnd,
        0,
        0,
    )
    body += opts + data
    return ipv4(
        6, body[:16] + struct.pack(">H", checksum(pseudo(6, len(body), MY_IP, PEER_IP) + body)) + body[18:]
    )


@dataclass(frozen=True)
class Seg:
    """A TCP segment that came back, checked."""

    dport: int
    seq: int
    ack: int
    flags: int
    wnd: int
    data: bytes


def payload_of(frame: bytes, proto: int) -> bytes:
    """The IP payload of a frame addressed to us; asserts every header field that matters."""
    assert frame[:6] == mac(ME)
    assert frame[6:12] == mac(PEER)
    assert frame[12:14] == b"\x08\0"
    head = frame[14:34]
    assert head[0] == 0x45
    assert checksum(head) == 0
    assert head[9] == proto
    assert (head[12:16], head[16:20]) == (ip(PEER_IP), ip(MY_IP))
    total = struct.unpack(">H", head[2:4])[0]
    assert len(frame) == max(60, 14 + total)
    return frame[34 : 14 + total]


def seg_of(frame: bytes) -> Seg:
    p = payload_of(frame, 6)
    assert checksum(pseudo(6, len(p), PEER_IP, MY_IP) + p) == 0
    _, dport, seq, ack, off, flags, wnd = struct.unpack(">HHIIBBH", p[:16])
    return Seg(dport, seq, ack, flags, wnd, p[off >> 4 << 2 :])

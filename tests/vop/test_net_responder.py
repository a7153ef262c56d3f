"""The user-space responder, frame by frame: it stands in for a host where no TAP may be had (VOP-59)."""

from __future__ import annotations

import random
import select
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from frames import (
    ACK,
    FIN,
    ME,
    MY_IP,
    PEER,
    PEER_IP,
    PSH,
    RST,
    SYN,
    Seg,
    arp,
    checksum,
    eth,
    icmp,
    ip,
    ipv4,
    mac,
    payload_of,
    pseudo,
    seg_of,
    tcp,
    udp,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_emu.virtio.net import Responder


@pytest.fixture
def resp() -> Iterator[Responder]:
    with Responder(PEER, f"{PEER_IP}/24", lease=f"{MY_IP}/24") as r:
        yield r


def ask(resp: Responder, frame: bytes) -> list[bytes]:
    """Everything it says to one frame."""
    resp.input(frame)
    return drain(resp)


def drain(resp: Responder) -> list[bytes]:
    out = []
    while f := resp.output():
        out.append(f)
    return out


def test_arp_request_is_answered(resp: Responder) -> None:
    """An ARP request for its address gets a reply with its MAC; one for another address gets none."""
    (reply,) = ask(resp, arp())
    assert reply[:14] == mac(ME) + mac(PEER) + b"\x08\x06"
    assert reply[14:42] == struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2) + mac(PEER) + ip(PEER_IP) + mac(ME) + ip(
        MY_IP
    )
    assert len(reply) == 60
    assert ask(resp, arp(target="172.31.1.7")) == []


@pytest.mark.parametrize("size", [0, 1, 56, 1472])
def test_vop_59_icmp_echo_is_answered(resp: Responder, size: int) -> None:
    """VOP-59: an echo request comes back with the same identifier, number and data."""
    data = random.Random(size).randbytes(size)
    (reply,) = ask(resp, icmp(8, 77, 3, data))
    p = payload_of(reply, 1)
    assert checksum(p) == 0
    assert p[0] == 0
    assert p[4:] == struct.pack(">HH", 77, 3) + data


def test_udp_echo(resp: Responder) -> None:
    """UDP port 7 sends the datagram back; port 7 to port 7 is not a perpetual motion machine."""
    (reply,) = ask(resp, udp(4000, 7, b"hello"))
    p = payload_of(reply, 17)
    assert checksum(pseudo(17, len(p), PEER_IP, MY_IP) + p) == 0
    assert p[:6] == struct.pack(">HHH", 7, 4000, 13)
    assert p[8:] == b"hello"
    assert ask(resp, udp(7, 7, b"x")) == []
    assert ask(resp, udp(4000, 9, b"x")) == []


def dhcp(kind: int, *, wanted: str | None = None, server: str | None = None, flags: int = 0) -> bytes:
    body = (
        struct.pack(">BBBBIHH", 1, 1, 6, 0, 0xABCD1234, 0, flags)
        + bytes(16)
        + mac(ME)
        + bytes(10)
        + bytes(192)
    )
    body += b"\x63\x82\x53\x63" + bytes([53, 1, kind])
    if wanted:
        body += bytes([50, 4]) + ip(wanted)
    if server:
        body += bytes([54, 4]) + ip(server)
    return udp(68, 67, body + b"\xff", src="0.0.0.0", dst="255.255.255.255", dst_mac="ff:ff:ff:ff:ff:ff")


def options(frame: bytes) -> dict[int, bytes]:
    body, out = frame[14 + 28 + 240 :], {}
    while body[0] != 255:
        out[body[0]] = body[2 : 2 + body[1]]
        body = body[2 + body[1] :]
    return out


def test_dhcp_hands_out_the_card_address(resp: Responder) -> None:
    """DISCOVER gets an OFFER and REQUEST an ACK with the card's address of VOP-59, mask and router."""
    for kind, answer in ((1, 2), (3, 5)):
        (reply,) = ask(resp, dhcp(kind, wanted=MY_IP if kind == 3 else None))
        o = options(reply)
        assert o[53] == bytes([answer])
        assert (o[54], o[1], o[3]) == (ip(PEER_IP), ip("255.255.255.0"), ip(PEER_IP))
        bootp = reply[42:]
        assert bootp[4:8] == bytes.fromhex("abcd1234")
        assert bootp[16:20] == ip(MY_IP)
        assert reply[:6] == mac(ME)


def test_dhcp_refuses_other_addresses_and_obeys_flags(resp: Responder) -> None:
    """Another address is NAKed by broadcast; a request meant for another server is ignored."""
    (nak,) = ask(resp, dhcp(3, wanted="172.31.1.9"))
    assert options(nak)[53] == b"\x06"
    assert nak[:6] == b"\xff" * 6
    assert ask(resp, dhcp(3, wanted=MY_IP, server="172.31.1.253")) == []
    (offer,) = ask(resp, dhcp(1, flags=0x8000))
    assert offer[:6] == b"\xff" * 6


def to_port(port: int, frames: list[bytes]) -> list[Seg]:
    """Segments for one of several connections; others may have sent again meanwhile."""
    return [s for s in map(seg_of, frames) if s.dport == port]


class Client:
    """A TCP client that says exactly what the test wants."""

    def __init__(self, resp: Responder, port: int = 5000, *, wnd: int = 65535, mss: int = 1460) -> None:
        self.resp, self.port, self.seq = resp, port, 1000 * port
        (f,) = ask(resp, tcp(port, self.seq, 0, SYN, opts=struct.pack(">BBH", 2, 4, mss), wnd=wnd))
        s = seg_of(f)
        assert s.flags == SYN | ACK
        assert s.ack == self.seq + 1
        self.seq += 1
        self.nxt = self.fresh = s.seq + 1 & 0xFFFFFFFF
        assert self.say(ACK, wnd=wnd) == []

    def say(
        self,
        flags: int,
        data: bytes = b"",
        *,
        wnd: int = 65535,
        seq: int | None = None,
        ack: int | None = None,
    ) -> list[Seg]:
        at = self.seq if seq is None else seq
        out = ask(self.resp, tcp(self.port, at, self.nxt if ack is None else ack, flags, data, wnd=wnd))
        # On a busy machine a fifth of a second may have passed since the last call: what it sends again says nothing.
        return [s for s in to_port(self.port, out) if not self._again(s)]

    def _again(self, s: Seg) -> bool:
        """Has all of it come before?"""
        length = len(s.data) + bool(s.flags & FIN)
        end = s.seq + length & 0xFFFFFFFF
        if not length or not 0 < (end - self.fresh & 0xFFFFFFFF) < 1 << 31:
            return bool(length)
        self.fresh = end
        return False

    def later(self, within_s: float = 20.0) -> list[Seg]:
        """What it says by itself, when a timer is due."""
        assert select.select([self.resp.poll_fd], [], [], within_s)[0], "no timer fired"
        said = [seg_of(f) for f in drain(self.resp)]
        for s in said:
            self._again(s)
        return said


def test_tcp_echo_and_close(resp: Responder) -> None:
    """Open, echo, half close by the client, FIN from the responder, done: RFC 9293's passive side."""
    c = Client(resp)
    (s,) = c.say(ACK | PSH, b"hello world")
    assert (s.data, s.seq, s.ack) == (b"hello world", c.nxt, c.seq + 11)
    c.seq += 11
    c.nxt += 11
    fins = c.say(ACK | FIN)
    assert [s.flags & FIN for s in fins] == [FIN]
    c.seq += 1
    assert fins[0].ack == c.seq
    c.nxt += 1
    assert c.say(ACK) == []
    # The connection is gone: the same segment again is met by a reset.
    (s,) = c.say(ACK)
    assert s.flags & RST
    assert resp.stats()["tcp_accepted"] == 1


def test_tcp_large_segments_are_cut_to_the_peers_mss(resp: Responder) -> None:
    """A 12000-byte segment (segmentation offload) comes back in pieces of the peer's MSS."""
    c = Client(resp, mss=1000)
    data = random.Random(5).randbytes(12000)
    out = c.say(ACK, data)
    assert b"".join(s.data for s in out) == data
    assert max(len(s.data) for s in out) == 1000


def test_tcp_respects_the_peers_window_and_probes(resp: Responder) -> None:
    """No byte beyond the offered window; with a closed window a probe of one byte follows, then the rest."""
    c = Client(resp, wnd=4)
    out = c.say(ACK, b"0123456789", wnd=4)
    assert b"".join(s.data for s in out) == b"0123"
    c.seq += 10
    c.nxt += 4
    assert c.say(ACK, wnd=0) == []
    (probe,) = c.later()
    assert probe.data == b"4"
    c.nxt += 1
    out = c.say(ACK, wnd=1000)
    assert b"".join(s.data for s in out) == b"56789"


def test_tcp_retransmits_what_is_not_acknowledged(resp: Responder) -> None:
    """A lost echo is sent again from the first byte without an answer, and the SYN-ACK likewise."""
    c = Client(resp)
    (first,) = c.say(ACK, b"lost?")
    c.seq += 5
    (again,) = c.later()
    assert (again.seq, again.data) == (first.seq, b"lost?")
    c.nxt += 5
    assert c.say(ACK) == []
    resp.input(tcp(6000, 1, 0, SYN))
    drain(resp)
    (synack,) = c.later()
    assert synack.flags == SYN | ACK
    assert resp.stats()["tcp_retransmits"] >= 2


def test_tcp_ack_beyond_a_retransmission_counts(resp: Responder) -> None:
    """After going back, an acknowledgement of everything sent before is taken (no endless resending)."""
    c = Client(resp, mss=100)
    c.say(ACK, bytes(300))
    c.seq += 300
    c.later()  # goes back; the client has everything and says so
    c.nxt += 300
    assert c.say(ACK) == []
    (s,) = c.say(ACK, b"next")
    assert s.data == b"next"


def test_tcp_out_of_order_and_overlap(resp: Responder) -> None:
    """A gap gets a duplicate ACK and no echo; an overlap echoes only the new part."""
    c = Client(resp)
    (dup,) = c.say(ACK, b"later", seq=c.seq + 100)
    assert (dup.data, dup.ack) == (b"", c.seq)
    (s,) = c.say(ACK, b"abc")
    c.nxt += 3
    (s,) = c.say(ACK, b"abcdef")
    assert s.data == b"def"
    assert s.ack == c.seq + 6


def test_tcp_window_closes_when_the_client_does_not_read(resp: Responder) -> None:
    """A client that never takes its echo fills the buffer: the window goes to 0, nothing is lost."""
    c = Client(resp, wnd=0)
    sent = 0
    for _ in range(30):
        out = c.say(ACK, bytes([sent % 251]) * 1460, wnd=0)
        window = out[-1].wnd
        taken = (out[-1].ack - c.seq) & 0xFFFFFFFF
        c.seq += taken
        sent += taken
        if window == 0:
            break
    assert window == 0
    assert sent == 16384
    end = c.nxt + sent & 0xFFFFFFFF
    out = c.say(ACK, wnd=65535)
    while c.nxt != end:
        assert out or c.nxt != c.fresh
        c.nxt = c.fresh
        out = c.say(ACK, wnd=65535)
    assert b"".join(s.data for s in out) == b""  # no byte more


def test_tcp_reset_and_stray_segments(resp: Responder) -> None:
    """A RST at the right number ends the connection, a forged one does not; strays are reset."""
    c = Client(resp)
    assert [s.flags for s in c.say(RST, seq=c.seq + 500)] == [ACK]
    assert len(c.say(ACK, b"x")) == 1
    c.seq += 1
    assert c.say(RST) == []
    (s,) = c.say(ACK, b"y")
    assert s.flags & RST
    (s,) = [seg_of(f) for f in ask(resp, tcp(5001, 5, 0, SYN, dport=80))]
    assert s.flags == RST | ACK
    assert s.ack == 6


def test_tcp_table_is_bounded(resp: Responder) -> None:
    """Sixteen connections work at a time; half-open ones give way, established ones do not."""
    clients = [Client(resp, 7000 + i) for i in range(16)]
    (s,) = to_port(8000, ask(resp, tcp(8000, 1, 0, SYN)))
    assert s.flags & RST
    assert resp.stats()["tcp_refused"] == 1
    for i, c in enumerate(clients):
        (s,) = c.say(ACK, b"%d" % i)
        assert s.data == b"%d" % i
    clients[0].seq += 1
    assert clients[0].say(RST) == []
    for i in range(5):  # a flood of SYNs shares the one free slot
        (s,) = to_port(9000 + i, ask(resp, tcp(9000 + i, 1, 0, SYN)))
        assert s.flags == SYN | ACK


def test_checksums_are_verified_unless_left_open(resp: Responder) -> None:
    """A wrong checksum is dropped; one that segmentation offload has left open (NEEDS_CSUM) is not."""
    good = bytearray(udp(4000, 7, b"data"))
    good[40] ^= 0xFF
    assert ask(resp, bytes(good)) == []
    assert resp.stats()["bad_frames"] == 1
    resp.input(bytes(good), csum_ok=True)
    assert len(drain(resp)) == 1


def test_fragments_and_other_addresses_are_ignored(resp: Responder) -> None:
    """No reassembly, no forwarding: counted as ignored."""
    assert ask(resp, ipv4(17, b"\0" * 16, frag=0x2000)) == []
    assert ask(resp, ipv4(17, b"\0" * 16, dst="172.31.1.77")) == []
    assert ask(resp, eth(b"\0" * 40, 0x86DD)) == []
    assert resp.stats()["ignored_frames"] == 3


def test_output_is_bounded(resp: Responder) -> None:
    """A thousand requests without a reader fill a bounded queue; the rest is counted."""
    for i in range(1000):
        resp.input(icmp(8, 1, i, b""))
    assert len(drain(resp)) == 64
    assert resp.stats()["out_overflow"] == 936


def test_ping_out(resp: Responder) -> None:
    """It resolves the address, pings, measures, and reports what was lost."""
    stop = threading.Event()

    def peer() -> None:
        while not stop.is_set():
            select.select([resp.poll_fd], [], [], 0.05)
            for f in drain(resp):
                if f[12:14] == b"\x08\x06":
                    resp.input(arp(2, dst=PEER))
                else:
                    p = payload_of(f, 1)
                    ident, seq = struct.unpack(">HH", p[4:8])
                    if seq != 2:
                        resp.input(icmp(0, ident, seq, p[8:]))

    t = threading.Thread(target=peer)
    t.start()
    try:
        result = resp.ping(MY_IP, 4, interval_s=0.01, timeout_s=2)
    finally:
        stop.set()
        t.join()
    assert (result.sent, len(result.rtts_s), result.lost) == (4, 3, 1)
    assert all(0 < r < 2 for r in result.rtts_s)


def test_ping_without_a_loop_ends(resp: Responder) -> None:
    """A ping that nobody serves ends by itself with every request lost."""
    t0 = time.monotonic()
    assert resp.ping(MY_IP, 1, interval_s=0.01, timeout_s=0.1).lost == 1
    assert time.monotonic() - t0 < 20


FRAMES = [
    arp(), icmp(8, 1, 1, b"x" * 56), udp(4000, 7, b"hello"), dhcp(1), dhcp(3, wanted=MY_IP), tcp(5000, 1, 0, SYN),
    tcp(5000, 2, 1, ACK, b"data", opts=b"\x02\x04\x05\xb4\x01\x01\x01\x00"), icmp(0, 1, 1, b""),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FRAMES), st.data())
def test_hostile_frames(base: bytes, data: st.DataObject) -> None:
    """VOP 11: cut, extended and altered frames never do more than be counted; a good one works after."""
    with Responder(PEER, f"{PEER_IP}/24", lease=f"{MY_IP}/24") as r:
        frame = bytearray(base[: data.draw(st.integers(0, len(base)))])
        for at, value in data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8)):
            if at < len(frame):
                frame[at] = value
        frame += data.draw(st.binary(max_size=40))
        r.input(bytes(frame), csum_ok=True)
        for f in drain(r):
            assert 60 <= len(f) <= 1514
        assert r.stats()["frames_in"] == 1
        assert len(ask(r, arp())) == 1

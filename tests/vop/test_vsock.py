"""virtio-vsock (virtio 1.2, 5.10): the device, packet by packet, against rule-abiding and hostile peers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vsockpeer import CARD, FIELDS, HOST, Peer

from mic_emu import layout as L
from mic_emu.testing.machine import eventually
from mic_emu.virtio import vsock_node
from mic_emu.virtio.vsock import RX, Vsock
from mic_emu.virtio.vsock_conn import BOTH, HEADER, NO_RECEIVE, NO_SEND, Op

BUFFER = 16 << 10


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    before = len(os.listdir("/proc/self/fd"))
    with Peer(tmp_path, buffer="16K") as p:
        yield p
    assert not list(tmp_path.glob("vsock.sock"))
    assert len(os.listdir("/proc/self/fd")) <= before + 20  # the test's own sockets; not one per connection


def test_vsock_program_of_the_host_connects(peer: Peer) -> None:
    """CONNECT becomes a REQUEST with both ids and ports; RESPONSE is OK; bytes pass both ways; RST closes."""
    sock = peer.connect(b"CONNECT 77\n")
    header = peer.expect(Op.REQUEST)
    assert (header["src_cid"], header["dst_cid"], header["dst_port"]) == (HOST, CARD, 77)
    assert header["src_port"] >= 1 << 30
    assert header["buf_alloc"] == BUFFER
    port = header["src_port"]
    peer.send(Op.RESPONSE, local=77, peer=port)
    assert sock.recv(64) == b"OK %d\n" % port
    sock.sendall(b"to the card")
    header, data = peer.recv()
    assert (header["op"], header["flags"], data) == (Op.RW, 0, b"to the card")
    peer.send(Op.RW, b"to the host", local=77, peer=port)
    assert sock.recv(64) == b"to the host"
    peer.send(Op.RST, local=77, peer=port)
    assert sock.recv(64) == b""


def test_vsock_program_of_the_card_connects(peer: Peer) -> None:
    """REQUEST for a port at which a program listens: RESPONSE, and it is connected."""
    with peer.listen(5) as listener:
        peer.send(Op.REQUEST, peer=5)
        header = peer.expect(Op.RESPONSE)
        assert (header["src_port"], header["dst_port"]) == (5, 1000)
        program, _ = listener.accept()
        peer.send(Op.RW, b"hello", peer=5)
        assert program.recv(64) == b"hello"
        program.sendall(b"hi")
        assert peer.recv()[1] == b"hi"
        program.close()
        assert peer.expect(Op.SHUTDOWN)["flags"] in (NO_SEND, NO_RECEIVE, BOTH)


@pytest.mark.parametrize("what", ["nothing", "dead", "file", "link"])
def test_vsock_request_that_nobody_hears_is_reset(peer: Peer, what: str) -> None:
    """No socket, one whose program died, a file, or a link that leads elsewhere: RST."""
    path = peer.folder / "vsock.sock_5"
    if what == "dead":
        peer.listen(5).close()
    elif what == "file":
        path.write_text("")
    elif what == "link":
        peer.listen(6)
        path.symlink_to(peer.folder / "vsock.sock_6")
    peer.send(Op.REQUEST, peer=5)
    header = peer.expect(Op.RST)
    assert (header["src_port"], header["dst_port"]) == (5, 1000)
    peer.works()


@pytest.mark.parametrize(
    "line", [b"HELLO 5\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 4294967295\n", b"x" * 100]
)
def test_vsock_bad_greeting_is_closed(peer: Peer, line: bytes) -> None:
    """What is no CONNECT line ends the connection, and nothing of it reaches the card."""
    sock = peer.connect(line)
    assert sock.recv(64) == b""
    peer.works()


def test_vsock_greeting_in_pieces_and_with_data_behind_it(peer: Peer) -> None:
    """The line may come byte by byte; what follows it at once is the first data."""
    slow = peer.connect(b"")
    for byte in b"CONNECT 9":
        slow.sendall(bytes([byte]))
    slow.sendall(b"\nfirst")
    port = peer.expect(Op.REQUEST)["src_port"]
    peer.send(Op.RESPONSE, local=9, peer=port)
    assert slow.recv(64) == b"OK %d\n" % port
    assert peer.recv()[1] == b"first"


def test_vsock_refused_connection_is_closed(peer: Peer) -> None:
    """RST to a REQUEST: the program's connection is closed, without a line."""
    sock = peer.connect()
    peer.send(Op.RST, peer=peer.expect(Op.REQUEST)["src_port"])
    assert sock.recv(64) == b""


def test_vsock_silence_ends_in_time(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No RESPONSE, no greeting, no answer to SHUTDOWN: each has its limit, and the peer is told."""
    for name in ("GREETING_S", "REQUEST_S", "CLOSE_S"):
        monkeypatch.setattr(vsock_node, name, 0.2)
    assert peer.connect(b"CONN").recv(64) == b""
    sock = peer.connect()
    port = peer.expect(Op.REQUEST)["src_port"]
    assert peer.expect(Op.RST)["src_port"] == port
    assert sock.recv(64) == b""
    closed, port = peer.connected()
    closed.close()
    while (header := peer.recv()[0])["op"] == Op.SHUTDOWN:
        pass
    assert (header["op"], header["src_port"]) == (Op.RST, port)


def test_vsock_credit_of_a_reader_that_never_reads(peer: Peer) -> None:
    """A full buffer is accepted, the byte behind it is not; others are not harmed, nothing grows."""
    with peer.listen(5) as listener:
        peer.send(Op.REQUEST, peer=5)
        peer.expect(Op.RESPONSE)
        program, _ = listener.accept()
        sent = 0
        while True:  # what the program's own socket takes counts as read
            peer.send(Op.RW, bytes(4096), peer=5)
            sent += 4096
            conn = next(iter(peer.device.node._by_ports.values()))  # type: ignore[union-attr]
            if sum(map(len, conn.kept)) == BUFFER:
                break
            assert sent < 64 << 20
        peer.send(Op.CREDIT_REQUEST, peer=5)
        while (header := peer.recv()[0])["fwd_cnt"] < sent - BUFFER:
            assert header["op"] == Op.CREDIT_UPDATE
        assert header["fwd_cnt"] == sent - BUFFER
        peer.works()
        peer.send(Op.RW, b"x", peer=5)
        assert peer.expect(Op.RST)["src_port"] == 5
        got = 0
        program.settimeout(20)
        while data := program.recv(1 << 20):
            got += len(data)
        assert got == sent - BUFFER


def test_vsock_credit_comes_back_as_the_program_reads(peer: Peer) -> None:
    """CREDIT_UPDATE after half a buffer at the latest: a stream of many buffers never stops."""
    with peer.listen(5) as listener:
        peer.send(Op.REQUEST, peer=5)
        told = peer.expect(Op.RESPONSE)["fwd_cnt"]
        program, _ = listener.accept()
        program.settimeout(20)
        want = bytes(range(256)) * 16
        for n in range(64):
            while n * 4096 + 4096 - told > BUFFER:
                told = peer.expect(Op.CREDIT_UPDATE)["fwd_cnt"]
            peer.send(Op.RW, want, peer=5)
            got = b""
            while len(got) < 4096:
                got += program.recv(4096 - len(got))
            assert got == want


def test_vsock_sender_keeps_to_the_peers_credit(peer: Peer) -> None:
    """It stops at buf_alloc, asks once, and goes on with what the update grants, byte exact."""
    sock, port = peer.connected(buf_alloc=1000)
    data = os.urandom(3000)
    sock.sendall(data)
    _header, got = peer.recv()
    while len(got) < 1000:
        got += peer.recv()[1]
    assert got == data[:1000]
    peer.expect(Op.CREDIT_REQUEST)
    peer.send(Op.CREDIT_UPDATE, peer=port, buf_alloc=1000, fwd_cnt=500)
    assert peer.recv()[1] == data[1000:1500]
    peer.expect(Op.CREDIT_REQUEST)
    peer.send(Op.CREDIT_UPDATE, peer=port, buf_alloc=2000, fwd_cnt=1500)
    assert peer.recv()[1] == data[1500:]
    peer.send(Op.CREDIT_UPDATE, peer=port, buf_alloc=100, fwd_cnt=9999)  # more than was ever sent
    sock.sendall(b"more")
    peer.send(Op.RST, peer=port)
    with pytest.raises(ConnectionResetError):  # what it wrote last has not arrived
        sock.recv(1)


def test_vsock_packets_fit_the_drivers_buffers(tmp_path: Path) -> None:
    """Large writes become packets as large as the buffers, in order; a header may be split over segments."""
    with Peer(tmp_path, room=1000, buffers=4) as peer:
        sock, _ = peer.connected()
        data = os.urandom(20000)
        sock.sendall(data)
        got = b""
        while len(got) < len(data):
            _, piece = peer.recv()
            assert len(piece) <= 1000
            got += piece
        assert got == data


def test_vsock_many_connections_share_buffers(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card can make the host keep does not grow with its connections; one that goes makes room again."""
    monkeypatch.setattr(vsock_node, "WHOLE_BUFFERS", 2)
    with peer.listen(5, backlog=16):
        offers = []
        for n in range(9):
            peer.send(Op.REQUEST, local=n + 1, peer=5)
            offers.append(peer.expect(Op.RESPONSE)["buf_alloc"])
        assert offers == [BUFFER, BUFFER, *(max(4096, BUFFER * 2 // n) for n in range(3, 10))]
        for n in range(9):
            peer.send(Op.RST, local=n + 1, peer=5)
        peer.send(Op.REQUEST, local=99, peer=5)
        assert peer.expect(Op.RESPONSE)["buf_alloc"] == BUFFER


def test_vsock_header_over_several_segments(peer: Peer) -> None:
    """Neither side may count on a header in one piece."""
    rig = peer.rig
    at = rig.rig.alloc(4096)
    packet = L.VSOCK_HDR.pack(src_cid=CARD, dst_cid=HOST, src_port=1, dst_port=5, type=1, op=Op.REQUEST)
    rig.rig.bus.gddr.write(at, packet)
    for n in range(32):  # use up the whole buffers
        peer.send(Op.RW, local=n + 1)
        peer.rig.answer(peer._rx.pop(0), RX)
    back = rig.rig.alloc(4096)
    rig.driver.add([], [(back, 10), (back + 100, 30), (back + 200, 100)], 9999, RX)
    rig.driver.add([(at, 7), (at + 7, 30), (at + 37, 7)], [], 8888, 1)
    rig.driver.kick(1)
    rig.driver.kick(RX)
    eventually(lambda: rig.driver.get(RX) == (9999, HEADER.size), 20, "the answer")
    read = rig.rig.bus.gddr.read
    header = HEADER.unpack(read(back, 10) + read(back + 100, 30) + read(back + 200, 4))
    assert dict(zip(FIELDS, header, strict=True))["op"] == Op.RST


GOOD = {"src_cid": CARD, "dst_cid": HOST, "src_port": 1000, "dst_port": 5, "type": 1}
HOSTILE = {
    "short": (b"x" * 43, False),
    "one byte": (b"x", False),
    "another's id": (L.VSOCK_HDR.pack(**{**GOOD, "src_cid": 9}, op=Op.RW), False),
    "not for us": (L.VSOCK_HDR.pack(**{**GOOD, "dst_cid": 9}, op=Op.RW), False),
    "reserved bits of the id": (L.VSOCK_HDR.pack(**{**GOOD, "src_cid": CARD | 1 << 32}, op=Op.RW), False),
    "longer than the chain": (L.VSOCK_HDR.pack(**GOOD, op=Op.RW, len=1 << 31) + b"x", True),
    "unknown type": (L.VSOCK_HDR.pack(**{**GOOD, "type": 2}, op=Op.REQUEST), True),
    "unknown operation": (L.VSOCK_HDR.pack(**GOOD, op=99), True),
    "operation 0": (L.VSOCK_HDR.pack(**GOOD), True),
    "data for nobody": (L.VSOCK_HDR.pack(**GOOD, op=Op.RW), True),
    "response to nothing": (L.VSOCK_HDR.pack(**GOOD, op=Op.RESPONSE), True),
    "shutdown of nothing": (L.VSOCK_HDR.pack(**GOOD, op=Op.SHUTDOWN, flags=3), True),
    "credit for nothing": (L.VSOCK_HDR.pack(**GOOD, op=Op.CREDIT_REQUEST), True),
    "reset of nothing": (L.VSOCK_HDR.pack(**GOOD, op=Op.RST), False),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_vsock_hostile_packet(peer: Peer, name: str) -> None:
    """Each is answered with RST, or with nothing where there is nobody to answer to; the device goes on."""
    packet, answered = HOSTILE[name]
    peer.raw(packet)
    if answered:
        header = peer.expect(Op.RST)
        assert (header["src_port"], header["dst_port"], header["type"]) == (5, 1000, 1)
    peer.works()


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RESPONSE, 0, 99])
def test_vsock_wrong_operation_ends_its_connection_only(peer: Peer, op: int) -> None:
    """A second REQUEST, a second RESPONSE, an unknown operation: RST for that connection."""
    other, _ = peer.connected()
    sock, port = peer.connected()
    peer.send(op, peer=port)
    assert peer.expect(Op.RST)["src_port"] == port
    assert sock.recv(1) == b""
    other.sendall(b"still here")
    assert peer.recv()[1] == b"still here"


def test_vsock_nothing_but_response_to_a_request(peer: Peer) -> None:
    """Data or SHUTDOWN before RESPONSE: RST."""
    for op in (Op.RW, Op.SHUTDOWN):
        sock = peer.connect()
        port = peer.expect(Op.REQUEST)["src_port"]
        peer.send(op, peer=port, flags=3)
        assert peer.expect(Op.RST)["src_port"] == port
        assert sock.recv(1) == b""


def test_vsock_data_after_shutdown_is_reset(peer: Peer) -> None:
    """Who said that it sends no more does not."""
    sock, port = peer.connected()
    peer.send(Op.SHUTDOWN, peer=port, flags=NO_SEND)
    assert sock.recv(1) == b""
    peer.send(Op.RW, b"x", peer=port)
    assert peer.expect(Op.RST)["src_port"] == port


def test_vsock_half_close_by_the_program(peer: Peer) -> None:
    """shutdown(SHUT_WR) arrives behind the data; the other direction goes on; both ended: SHUTDOWN of both."""
    sock, port = peer.connected()
    sock.sendall(b"last words")
    sock.shutdown(socket.SHUT_WR)
    assert peer.recv()[1] == b"last words"
    assert peer.expect(Op.SHUTDOWN)["flags"] == NO_SEND
    peer.send(Op.RW, b"answer", peer=port)
    assert sock.recv(64) == b"answer"
    peer.send(Op.SHUTDOWN, peer=port, flags=NO_SEND)
    assert sock.recv(64) == b""
    assert peer.expect(Op.SHUTDOWN)["flags"] == BOTH
    peer.send(Op.RST, peer=port)
    eventually(lambda: peer.device.stats()["open"] == 0, 20, "the end of the connection")


def test_vsock_half_close_by_the_peer(peer: Peer) -> None:
    """NO_SEND: the program reads to the end of file and writes on. NO_RECEIVE: its next write fails."""
    sock, port = peer.connected()
    peer.send(Op.RW, b"all", peer=port)
    peer.send(Op.SHUTDOWN, peer=port, flags=NO_SEND)
    assert sock.recv(64) == b"all"
    assert sock.recv(64) == b""
    sock.sendall(b"reply")
    assert peer.recv()[1] == b"reply"
    peer.send(Op.SHUTDOWN, peer=port, flags=BOTH)
    assert peer.expect(Op.RST)["src_port"] == port
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        sock.sendall(b"too late")


def test_vsock_reset_after_shutdown_loses_nothing(peer: Peer) -> None:
    """A peer that has sent everything and resets: the program still reads all that came before."""
    sock, port = peer.connected()
    sent = 0
    while not any(c.kept for c in list(peer.device.node._by_ports.values())):  # type: ignore[union-attr]
        peer.send(Op.RW, bytes(4096), peer=port)
        sent += 4096
    peer.send(Op.SHUTDOWN, peer=port, flags=BOTH)
    peer.send(Op.RST, peer=port)
    got = 0
    while data := sock.recv(1 << 20):
        got += len(data)
    assert got == sent
    eventually(lambda: peer.device.stats()["open"] == 0, 20, "the end of the connection")


def test_vsock_device_reset_closes_everything(peer: Peer) -> None:
    """The card resets the device: every program sees its connection end; afterwards all is as new."""
    socks = [peer.connected()[0] for _ in range(20)]
    peer.rig.reset()
    for sock in socks:
        assert sock.recv(1) == b""
    assert peer.device.stats()["open"] == 0
    peer._rx.clear()
    peer.offer(16)
    peer.works()


def test_vsock_buffer_without_room_is_given_back(peer: Peer) -> None:
    """A receive buffer that holds no packet is the driver's fault: returned empty, counted, not waited for."""
    assert peer.rig.request(room=HEADER.size, queue=RX) is not None
    assert peer.device.stats()["malformed"] == 1
    peer.works()


@pytest.mark.parametrize("buffer", ["1", "2G", "lots"])
def test_vsock_bad_buffer_option(buffer: str) -> None:
    """The option names its limits."""
    with pytest.raises(ValueError, match="buffer"):
        Vsock(buffer=buffer)


FIELD = st.sampled_from([0, 1, 2, 3, 5, 1000, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
PACKETS = st.lists(
    st.tuples(
        st.integers(0, 8),
        st.sampled_from([5, 6]),
        st.sampled_from([1000, 1001]),
        FIELD,
        FIELD,
        FIELD,
        st.binary(max_size=200),
        st.booleans(),
    ),
    max_size=40,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    print_blob=True,
)
@given(PACKETS)
def test_vsock_any_sequence_of_packets(
    peer: Peer, packets: list[tuple[int, int, int, int, int, int, bytes, bool]]
) -> None:
    """Whatever the card sends, to connections that exist or not: the device goes on, and forgets all by a reset."""
    with peer.listen(5) as listener:
        for op, port, local, buf, fwd, flags, payload, honest in packets:
            extra = {} if honest else {"len": buf}
            peer.send(op, payload, local=local, peer=port, buf_alloc=buf, fwd_cnt=fwd, flags=flags, **extra)
        listener.close()
        (peer.folder / "vsock.sock_5").unlink()
    peer.rig.reset()
    peer._rx.clear()
    peer.offer(8)
    peer.works()
    eventually(lambda: peer.device.stats()["open"] == 0, 20, "the end of all connections")
    peer.rig.reset()
    peer._rx.clear()
    peer.offer(8)

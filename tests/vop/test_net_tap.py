"""virtio-net with real TAPs in namespaces of their own and real programs at both ends (VOP-58, 59)."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from netwire import eventually

from mic_emu import netif, netns
from mic_emu._native import lib
from mic_emu.netif import NetError
from mic_emu.testing.netpair import NAME, BridgedEnds, Child, Ends, NetPair, NetRig
from mic_emu.testing.rings import FakeDriver
from mic_emu.virtio import net

MODERN = net.accepted_features(net.MODERN_FEATURES)
PERSONALITIES = {
    "modern": MODERN,
    "no_mrg": MODERN & ~net.bit("NET_F_MRG_RXBUF"),
    "compat": net.COMPAT_FEATURES,
    "no_offload": net.bit("F_VERSION_1") | net.bit("F_EVENT_IDX"),
}


def ping(ends: Ends, side: str, target: str, count: int, *extra: str) -> bool:
    """Ping until ``count`` answers are there or 25 s have passed. (Without -w, ping gives the last answer
    no more than two round trips, which a busy machine does not keep.)"""
    argv = ["ping", "-n", "-q", "-c", str(count), "-w", "25", "-i", "0.01", *extra, target]
    found = re.search(r" (\d+) received", ends.run(side, argv))
    return found is not None and int(found[1]) >= count


def in_ns(ns: netns.Namespaces, call: object) -> object:
    """Run ``call`` in a thread inside the network namespace, where sockets can be made; returns its value."""
    out: list[object] = []

    def main() -> None:
        netns.enter(-1, ns.net_fd)
        out.append(call())  # type: ignore[operator]

    t = threading.Thread(target=main, daemon=True)
    t.start()
    t.join()
    assert out, "the call in the namespace failed"
    return out[0]


@pytest.mark.tap
@pytest.mark.parametrize("features", PERSONALITIES.values(), ids=PERSONALITIES.keys())
@pytest.mark.peer("ping")
def test_vop_59_ping_both_ways(features: int) -> None:
    """VOP-59: host 172.31.1.254 and card 172.31.1.1 ping each other, small and 60 KB packets, no loss."""
    with NetPair(features) as p:
        assert (p.host_ip, p.card_ip) == ("172.31.1.254", "172.31.1.1")
        for side, addr in (("host", p.card_ip), ("card", p.host_ip)):
            for size in ("56", "60000"):
                assert ping(p, side, addr, 5, "-s", size)


def _tcp(p: Ends, server: str, client: str, nbytes: int) -> tuple[bytes, bytes]:
    """Stream random bytes from client to server with plain sockets; returns (sent, received)."""
    import random

    data = random.Random(nbytes).randbytes(nbytes)
    sides = {"host": (p.host, p.host_ip), "card": (p.card, p.card_ip)}

    def listen() -> socket.socket:
        return socket.create_server((sides[server][1], 0))

    srv = in_ns(sides[server][0], listen)
    assert isinstance(srv, socket.socket)
    with srv:
        cli = in_ns(sides[client][0], lambda: socket.create_connection(srv.getsockname(), timeout=20))
        assert isinstance(cli, socket.socket)
        srv.settimeout(20)
        conn, _ = srv.accept()
        conn.settimeout(20)
        got = bytearray()

        def send() -> None:
            cli.sendall(data)
            cli.shutdown(socket.SHUT_WR)

        t = threading.Thread(target=send, daemon=True)
        t.start()
        while part := conn.recv(1 << 20):
            got += part
        t.join()
        conn.close()
        cli.close()
    return data, bytes(got)


@pytest.mark.tap
@pytest.mark.parametrize("features", PERSONALITIES.values(), ids=PERSONALITIES.keys())
def test_vop_59_tcp_streams_are_unchanged(features: int, tmp_path: Path) -> None:
    """VOP-59: 20 MB of TCP each way arrive unchanged; with offload in frames of up to 64 KiB."""
    result = tmp_path / "stats"

    def after(nd: net.NetDevice) -> None:
        s = nd.stats()
        result.write_text(
            json.dumps([s.to_card_bytes / s.to_card_packets, s.to_card_drops + s.from_card_drops])
        )

    with NetPair(features, after=after) as p:
        for server, client in (("card", "host"), ("host", "card")):
            sent, got = _tcp(p, server, client, 20_000_000)
            assert sent == got
    mean, drops = json.loads(result.read_text())
    assert drops == 0
    if features == PERSONALITIES["no_offload"]:
        assert mean < 1515
    else:
        assert mean > 4000  # ACKs included: most data went in segmentation offload frames


@pytest.mark.tap
def test_vop_59_frames_of_64_kib_pass() -> None:
    """VOP-59: a segmentation offload frame of the largest size passes in one piece."""
    with NetPair(MODERN) as p:
        _tcp(p, "card", "host", 30_000_000)
        out = in_ns(p.card, lambda: Path("/proc/thread-self/net/dev").read_text())
        line = next(x for x in str(out).splitlines() if NAME in x)
        nbytes, packets = map(int, line.split(":")[1].split()[:2])
        assert nbytes / packets > 30000


@pytest.mark.tap
@pytest.mark.parametrize("features", [MODERN, net.COMPAT_FEATURES], ids=["modern", "compat"])
@pytest.mark.peer("iperf3")
def test_iperf3_both_ways(features: int) -> None:
    """iperf3 runs in both directions without loss of the link."""
    with NetPair(features) as p:
        with p.popen(
            "card",
            ["iperf3", "-s", "--forceflush", "-p", "5999"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as srv:
            try:
                assert srv.stdout
                while "listening" not in srv.stdout.readline():
                    pass
                for extra in ([], ["-R"]):
                    out = p.run("host", ["iperf3", "-c", p.card_ip, "-p", "5999", "-t", "1", "-J", *extra])
                    assert json.loads(out)["end"]["sum_received"]["bytes"] > 1 << 20
            finally:
                srv.kill()
        assert ping(p, "host", p.card_ip, 2)


@pytest.mark.tap
@pytest.mark.peer("ping")
def test_jumbo_mtu() -> None:
    """With an MTU of 9000 an unfragmented 8972-byte ping passes."""
    features = MODERN & ~sum(map(net.bit, ("NET_F_GUEST_TSO4", "NET_F_GUEST_TSO6", "NET_F_MRG_RXBUF")))
    with NetPair(features, mtu=9000) as p:
        assert ping(p, "card", p.host_ip, 2, "-M", "do", "-s", "8972")


@pytest.mark.tap
@pytest.mark.parametrize("buffers", [0, 50])
def test_device_reports_a_removed_tap(buffers: int) -> None:
    """When the interface goes away the device's loop says so instead of spinning or sleeping on; also
    while it does not read the TAP because the card has posted no buffers."""
    with NetRig(MODERN) as rig, netns.create() as ns:
        tap = ns.open_tap(NAME)
        keep = tap.fd
        ns.run(lambda: netif.set_up(NAME))
        net.prepare_tap(tap, MODERN, card=False)
        fake = FakeDriver(rig.rig)
        for _ in range(buffers):
            fake.add([], [(rig.rig.alloc(4096), 4096)])
        dev = rig.device(-1)
        with net.NetDevice(dev.vdev, keep) as nd:
            why: list[int] = []
            t = threading.Thread(target=lambda: why.append(nd.run()), daemon=True)
            t.start()
            eventually(lambda: nd.stats().sleeps, "the loop asleep")
            ns.run(lambda: _delete(NAME))
            t.join(20)
            assert why == [lib.MIC_RUN_LOCAL]
        dev.close()
        fake.close()
        tap.close()


def _delete(name: str) -> None:
    """Delete an interface by rtnetlink."""
    import struct

    index = socket.if_nametoindex(name)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as s:
        body = struct.pack("=BBHiII", 0, 0, 0, index, 0, 0)
        s.send(struct.pack("=IHHII", 16 + len(body), 17, 1 | 4, 1, 0) + body)
        err = struct.unpack_from("=i", s.recv(4096), 16)[0]
        if err:
            raise OSError(-err, os.strerror(-err))


@pytest.mark.tap
@pytest.mark.peer("ping", "tshark")
def test_pcap_opens_in_tshark(tmp_path: Path) -> None:
    """A capture at the backend holds both directions without the vnet header; tshark reads it."""
    path = tmp_path / "f.pcap"
    file = path.open("wb")
    state: dict[str, net.Capture] = {}

    def before(nd: net.NetDevice) -> None:
        state["cap"] = net.Capture(file.fileno())
        nd.capture(state["cap"])

    def after(nd: net.NetDevice) -> None:
        nd.capture(None)
        state["cap"].close()

    with NetPair(MODERN, before=before, after=after) as p:
        assert ping(p, "host", p.card_ip, 3)
        _tcp(p, "card", "host", 2_000_000)
    file.close()
    out = subprocess.run(
        ["tshark", "-r", str(path), "-T", "fields", "-e", "_ws.col.Protocol", "-e", "ip.src", "-e", "frame.len"],
        capture_output=True, text=True, check=True, timeout=30,
    ).stdout.splitlines()  # fmt: skip
    rows = [line.split("\t") for line in out]
    icmp = [r[1] for r in rows if r[0] == "ICMP"]
    assert icmp.count("172.31.1.254") >= icmp.count("172.31.1.1") >= 3  # requests, replies
    assert sum(int(r[2]) for r in rows if r[0] == "TCP") > 2_000_000
    assert max(int(r[2]) for r in rows) > 20000
    times = subprocess.run(
        ["tshark", "-r", str(path), "-T", "fields", "-e", "frame.time_epoch"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [float(t) for t in times] == sorted(float(t) for t in times)


@pytest.mark.tap
@pytest.mark.parametrize("tap_side", ["host", "card"])
@pytest.mark.peer("ping")
def test_vop_59_responder_serves_real_programs(tap_side: str) -> None:
    """VOP-59: a real kernel at one end pings the responder at the other and echoes 3 MB over TCP and
    10 datagrams over UDP; the responder pings back."""
    offer = net.offered_features("modern", offload=tap_side == "host")
    features = net.accepted_features(offer)
    with NetRig(features) as rig, Ends(features) as ends:
        other = "card" if tap_side == "host" else "host"
        ip, ns = (ends.host_ip, ends.host) if tap_side == "host" else (ends.card_ip, ends.card)
        target = ends.card_ip if tap_side == "host" else ends.host_ip
        tap = ends.host_tap if tap_side == "host" else ends.card_tap
        resp = net.Responder(netif.random_mac(), f"{target}/24")
        host_local, card_local = (tap.fd, resp) if tap_side == "host" else (resp, tap.fd)
        if tap_side == "host":
            child = Child(lambda stop: rig.serve_host(stop, host_local))
            serve = rig.serve_card
        else:
            child = Child(lambda stop: rig.serve_card(stop, card_local))
            serve = rig.serve_host
        stop = lib.mic_eventfd(0o4000)
        t = threading.Thread(target=serve, args=(stop, resp), daemon=True)
        t.start()
        try:
            assert ping(ends, tap_side, target, 5, "-s", "1000")
            assert resp.ping(ip, 5, interval_s=0.01).lost == 0
            assert _tcp_echo(ns, target, 3_000_000)
            assert _udp_echo(ns, target) == 10
        finally:
            os.write(stop, (1).to_bytes(8, "little"))
            t.join()
            os.close(stop)
            child.stop()
            resp.close()
        assert other


def _tcp_echo(ns: netns.Namespaces, target: str, nbytes: int) -> bool:
    import random

    data = random.Random(1).randbytes(nbytes)
    s = in_ns(ns, lambda: socket.create_connection((target, 7), timeout=20))
    assert isinstance(s, socket.socket)
    with s:
        s.settimeout(20)

        def send() -> None:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)

        t = threading.Thread(target=send, daemon=True)
        t.start()
        got = bytearray()
        while part := s.recv(1 << 16):
            got += part
        t.join()
    return bytes(got) == data


def _udp_echo(ns: netns.Namespaces, target: str) -> int:
    s = in_ns(ns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    assert isinstance(s, socket.socket)
    with s:
        s.settimeout(20)
        s.connect((target, 7))
        for i in range(10):
            s.send(b"datagram %d" % i)
            assert s.recv(100) == b"datagram %d" % i
    return 10


@pytest.mark.tap
def test_bridge_yardstick_carries_tcp() -> None:
    """The benchmark's yardstick, two TAPs and a plain copier, carries a stream unchanged."""
    with BridgedEnds() as p:
        sent, got = _tcp(p, "card", "host", 5_000_000)
        assert sent == got


@pytest.mark.tap
def test_tap_never_touches_an_existing_interface() -> None:
    """Opening a TAP of a name that exists is an error that says so; the interface stays as it was."""
    with netns.create() as ns, ns.open_tap("mic0"):

        def again() -> None:
            netif.open_tap("mic0").close()

        with pytest.raises(NetError, match=r"mic0.*was not touched"):
            ns.run(again)
        with pytest.raises(NetError, match="was not touched"):
            ns.open_tap("mic0")
        with pytest.raises(NetError, match="was not touched"):
            ns.run(lambda: netif.open_tap("lo").close())


@pytest.mark.tap
def test_interface_set_up_by_ioctl() -> None:
    """Address, MTU, MAC and state are what was asked for, without any helper program."""
    with netns.create() as ns, ns.open_tap("mic7"):

        def work() -> None:
            netif.configure("mic7", address="172.31.8.254/24", mac="02:11:22:33:44:55", mtu=9000)
            if (netif.get_mac("mic7"), netif.get_mtu("mic7")) != ("02:11:22:33:44:55", 9000):
                raise OSError(1, "not as set")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                s.connect(("172.31.8.1", 9))
                if s.getsockname()[0] != "172.31.8.254":
                    raise OSError(1, "no route")

        ns.run(work)
        with pytest.raises(NetError, match="mic9"):
            ns.run(lambda: netif.set_up("mic9"))


@pytest.mark.tap
def test_namespaces_are_made_under_signals() -> None:
    """A signal handler of the program is no failure of the helper process."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        for _ in range(30):
            with netns.create() as ns, ns.open_tap("mic0"):
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.tap
def test_namespaces_live_by_descriptor_only() -> None:
    """No process and no name is left behind: the pair is gone when its descriptors are closed."""
    ns = netns.create()
    inode = os.fstat(ns.net_fd).st_ino
    assert inode != os.stat("/proc/self/ns/net").st_ino
    assert not _children()
    ns.close()
    for fd in os.listdir("/proc/self/fd"):
        try:
            assert f"net:[{inode}]" not in os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            pass


def _children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.mark.parametrize(
    ("err", "step", "fix"),
    [
        ("EPERM", lib.MIC_NETNS_USER, "user namespaces"),
        ("ENOSPC", lib.MIC_NETNS_USER, "max_user_namespaces"),
        ("EACCES", lib.MIC_NETNS_OPEN, "chmod 666"),
        ("ENOENT", lib.MIC_NETNS_OPEN, "modprobe tun"),
        ("EPERM", lib.MIC_NETNS_TAP, "CAP_NET_ADMIN"),
    ],
)
def test_each_refusal_names_its_fix(err: str, step: int, fix: str) -> None:
    """EPERM, EACCES, ENOSPC, ENOENT: one sentence each that says what to do."""
    import errno

    e = netns._error(getattr(errno, err), step)
    assert e.errno == getattr(errno, err)
    assert fix in str(e)


@pytest.mark.root
def test_probe_falls_back_when_namespaces_are_used_up() -> None:
    """With the limit of network namespaces at 0 the probe says responder, ENOSPC and which limit to raise."""
    with netns.create() as outer:

        def work() -> None:
            Path("/proc/sys/user/max_net_namespaces").write_text("0")
            found = netns.probe()
            if found.mode != "responder" or "max_net_namespaces" not in found.reason:
                raise OSError(1, f"unexpected: {found}")

        outer.run(work)


@pytest.mark.root
def test_namespaces_as_an_ordinary_user() -> None:
    """An ordinary user becomes root inside its own pair; a TAP there needs an accessible /dev/net/tun."""
    import ctypes

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as a process that never was root
            with netns.create() as ns:
                open_to_all = os.access("/dev/net/tun", os.R_OK | os.W_OK)
                found = netns.probe()
                assert found.mode == ("ns" if open_to_all else "responder"), found
                assert open_to_all or "chmod 666" in found.reason
                ns.run(netif.loopback_up)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

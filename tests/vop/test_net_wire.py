"""virtio-net loops, frame by frame over packet sockets (VOP-58, 63, 64 and the policy of VOP 11)."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest
from netwire import BIG, Loop, Wire, eventually, frames

from mic_emu import layout
from mic_emu._native import lib
from mic_emu.testing.rings import NEEDS_RESET
from mic_emu.virtio import net

MODERN = net.accepted_features(net.MODERN_FEATURES)
PERSONALITIES = {
    "modern": MODERN,
    "no_mrg": MODERN & ~net.bit("NET_F_MRG_RXBUF"),
    "no_event_idx": MODERN & ~net.bit("F_EVENT_IDX"),
    "compat": net.COMPAT_FEATURES,
    "plain": net.bit("F_VERSION_1"),
}


def test_vop_58_compat_feature_word() -> None:
    """VOP-58: the compat personality offers net 0x3C1, and the header then has 10 bytes."""
    assert net.COMPAT_FEATURES == 0x3C1
    assert net.offered_features("compat") == 0x3C1
    assert net.header_length(net.COMPAT_FEATURES) == 10
    assert net.header_length(net.MODERN_FEATURES) == 12


def test_vop_58_compat_offloads_of_both_taps() -> None:
    """VOP-58: with the compat word both TAPs leave checksums and TCP segmentation to the other side."""
    want = 1 | 2 | 4 | 8
    assert net.host_offload(net.COMPAT_FEATURES) == want
    assert net.card_offload(net.COMPAT_FEATURES) == want
    assert net.host_offload(net.bit("F_VERSION_1")) == 0
    assert net.card_offload(net.bit("NET_F_CSUM")) == 1


def test_modern_driver_respects_feature_dependencies() -> None:
    """VOP 9.2: a 1.x driver takes GUEST_TSO only with GUEST_CSUM and HOST_TSO only with CSUM."""
    got = net.accepted_features(net.MODERN_FEATURES & ~net.bit("NET_F_GUEST_CSUM") & ~net.bit("NET_F_CSUM"))
    for name in ("NET_F_GUEST_TSO4", "NET_F_GUEST_TSO6", "NET_F_HOST_TSO4", "NET_F_HOST_ECN"):
        assert not got & net.bit(name), name


@pytest.mark.parametrize("features", PERSONALITIES.values(), ids=PERSONALITIES.keys())
def test_vop_59_frames_pass_unchanged_both_ways(features: int) -> None:
    """VOP-59: frames of every size up to what the features allow arrive unchanged, in order, both ways."""
    top = 1514 if features == net.bit("F_VERSION_1") else BIG
    sizes = [
        s for s in (14, 60, 61, 1514, 1518, 4095, 4096, 16371, 16372, 16373, 32768, 65000, BIG) if s <= top
    ]
    with Wire(features) as w:
        for side, other in (("host", "card"), ("card", "host")):
            for frame in frames(sizes):
                w.send(side, frame)
                assert w.recv(other) == frame
        # The device counts a frame after it has sent it, which the receiver may overtake.
        eventually(lambda: w.stats().from_card_packets == len(sizes), "the last frame to be counted")
        s = w.stats()
        assert s.to_card_packets == len(sizes)
        assert s.to_card_bytes == s.from_card_bytes == sum(sizes)
        assert s.to_card_drops == s.from_card_drops == 0


@pytest.mark.parametrize("features", [MODERN, net.COMPAT_FEATURES], ids=["modern", "compat"])
def test_vop_63_no_wake_is_lost(features: int) -> None:
    """VOP-63: 4000 frames each way, at most 16 on their way, so that both loops keep falling asleep and
    being woken: every one arrives, in order."""
    total = 4000
    with Wire(features) as w:
        windows = {side: threading.Semaphore(16) for side in ("host", "card")}
        got: dict[str, list[int]] = {"host": [], "card": []}

        def pour(side: str) -> None:
            for i in range(total):
                assert windows[side].acquire(timeout=30)
                w.send(side, i.to_bytes(4, "little") + bytes(60))

        def collect(side: str, other: str) -> None:
            for _ in range(total):
                got[side].append(int.from_bytes(w.recv(side)[:4], "little"))
                windows[other].release()

        threads = [threading.Thread(target=pour, args=(s,)) for s in got]
        threads += [threading.Thread(target=collect, args=p) for p in (("host", "card"), ("card", "host"))]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert got == {"host": list(range(total)), "card": list(range(total))}


def test_vop_63_ping_pong_alternates() -> None:
    """VOP-63: a strict request and reply pattern never stalls, whichever side sleeps."""
    with Wire(MODERN) as w:
        for frame in frames([64] * 3000):
            w.send("host", frame)
            assert w.recv("card") == frame
            w.send("card", frame)
            assert w.recv("host") == frame


@pytest.mark.parametrize("features", [MODERN, net.COMPAT_FEATURES], ids=["modern", "compat"])
def test_vop_63_driver_whose_ring_was_full_is_told(features: int) -> None:
    """VOP-63: the backend begins late: the card has filled its ring and sleeps with more to send. All of it leaves."""
    with Wire(features, host=False) as w:
        assert w.drv
        sent = list(frames([200] * 400))
        for frame in sent:
            w.send("card", frame)
        eventually(lambda: w.drv.stats().sleeps, "the driver to sleep")
        w.loops.append(Loop(w.nd.run, w.stop_fds[0], Wire._again))
        assert [w.recv("host") for _ in sent] == sent


@pytest.mark.parametrize("side", ["card", "host"])
def test_vop_63_last_frame_of_a_burst_is_not_forgotten(side: str) -> None:
    """VOP-63: one way only, so that nothing else wakes a loop that falls asleep as the last frame of a burst arrives."""
    with Wire(MODERN) as w:
        other = "host" if side == "card" else "card"
        for n in range(4000):
            burst = [n.to_bytes(4, "little") + bytes([i]) + bytes(59) for i in range(1 + n % 5)]
            for frame in burst:
                w.send(side, frame)
            assert [w.recv(other) for _ in burst] == burst


@pytest.mark.parametrize("features", [MODERN, net.COMPAT_FEATURES], ids=["modern", "compat"])
def test_vop_64_blocked_direction_does_not_stop_the_other(features: int) -> None:
    """VOP-64: with no receive buffer on the card, frames from the card still reach the host."""
    with Wire(features, card=False) as w:
        for frame in frames([1000] * 50):
            w.send("host", frame)  # nobody posted a buffer: these wait
        buf = w.rig.rig.alloc(4096)
        for frame in frames([200] * 300, seed=2):
            w.rig.rig.bus.gddr.write(buf, w.header() + frame)
            w.fake.add([(buf, w.hdr + len(frame))], [], i=1)
            w.fake.kick(1)
            assert w.recv("host") == frame
            eventually(lambda: w.fake.get(1), "the transmit buffer back")
        assert w.stats().to_card_packets == 0
        # What waits keeps nobody busy: the loop slept for each frame or two, not as often as it could look.
        assert w.stats().sleeps < 3000
        # And when buffers come, what waited is delivered.
        rx = w.rig.rig.alloc(4096)
        w.fake.add([], [(rx, 4096)], token=7, i=0)
        w.fake.kick(0)
        token, length = eventually(lambda: w.fake.get(0), "a received frame")
        assert (token, length) == (7, w.hdr + 1000)


def test_device_follows_what_the_card_accepted() -> None:
    """VOP 4.4: offered is not accepted. A card that took no feature gets 10-byte headers, one buffer per
    frame and no DATA_VALID, although the host offered everything."""
    with Wire(MODERN, card=False, host=False) as w:
        w.nd.accepted(0)
        w.loops.append(Loop(w.nd.run, w.stop_fds[0], Wire._again))
        bufs = _post(w, [2048] * 4)
        big, small = frames([4000, 1400])
        w.host.send(bytes(10) + big)
        w.host.send(bytes(10) + small)
        token, length = eventually(lambda: w.fake.get(0), "the small frame")
        assert (token, length) == (0, 1410)
        assert w.rig.rig.bus.gddr.read(bufs[0][0], length) == bytes(10) + small
        assert w.stats().to_card_drops == 1


def _post(w: Wire, sizes: list[int]) -> list[tuple[int, int]]:
    """Post receive buffers of these sizes, by token their index."""
    out = []
    for i, size in enumerate(sizes):
        addr = w.rig.rig.alloc(size)
        w.fake.add([], [(addr, size)], token=i, i=0)
        out.append((addr, size))
    w.fake.kick(0)
    return out


def _merged(w: Wire, bufs: list[tuple[int, int]], start: int = 0) -> tuple[bytes, int]:
    """One received frame out of several buffers: bytes without the header, and num_buffers."""
    token, length = eventually(lambda: w.fake.get(0), "a receive buffer")
    first = w.rig.rig.bus.gddr.read(bufs[token][0], length)
    n = int.from_bytes(first[10:12], "little")
    data = first
    for _ in range(n - 1):
        got = w.fake.get(0)
        assert got, "a merged frame was published in parts"
        data += w.rig.rig.bus.gddr.read(bufs[got[0]][0], got[1])
    return data[12:], n


def test_vop_59_mrg_rxbuf_spreads_a_frame_over_buffers() -> None:
    """VOP 9.5: a 64 KiB frame fills as many 4 KiB buffers as it needs; all appear at once, counted."""
    with Wire(MODERN, card=False) as w:
        bufs = _post(w, [4096] * 64)
        for frame in frames([BIG, 64, 9000, 4084, 4085]):
            w.send("host", frame)
            data, n = _merged(w, bufs)
            assert data == frame
            assert n == -(-(len(frame) + 12) // 4096)


def test_vop_59_mrg_rxbuf_frame_waits_for_more_buffers() -> None:
    """A frame larger than what is posted waits and is completed when the driver posts more."""
    with Wire(MODERN, card=False) as w:
        bufs = _post(w, [4096] * 3)
        (frame,) = frames([30000])
        w.send("host", frame)
        eventually(lambda: w.stats().sleeps and not w.stats().to_card_packets, "the loop to wait")
        assert w.fake.get(0) is None
        for i in range(3, 9):
            addr = w.rig.rig.alloc(4096)
            bufs.append((addr, 4096))
            w.fake.add([], [(addr, 4096)], token=i, i=0)
            w.fake.kick(0)
        data, n = _merged(w, bufs)
        assert (data, n) == (frame, 8)
        assert w.stats().to_card_drops == 0


def test_mrg_rxbuf_frame_larger_than_the_whole_ring_is_dropped() -> None:
    """When every buffer of the ring is not enough the frame is dropped and counted, and the next passes."""
    with Wire(MODERN, num=4, card=False) as w:
        bufs = _post(w, [2048] * 4)
        big, small = frames([30000, 100])
        w.send("host", big)
        eventually(lambda: w.stats().to_card_drops == 1, "the drop")
        w.send("host", small)
        assert _merged(w, bufs) == (small, 1)


def test_frame_larger_than_its_chain_is_dropped() -> None:
    """Without MRG_RXBUF a frame that does not fit its chain is dropped; the chain serves the next one."""
    with Wire(net.bit("F_VERSION_1"), card=False) as w:
        bufs = _post(w, [1024])
        big, small = frames([1200, 100])
        w.send("host", big)
        w.send("host", small)
        token, length = eventually(lambda: w.fake.get(0), "the small frame")
        assert w.rig.rig.bus.gddr.read(bufs[token][0], length)[12:] == small
        assert w.stats().to_card_drops == 1


def test_receive_chains_of_any_layout() -> None:
    """VOP-22: header split anywhere, many segments, readable rubbish in front: the frame arrives."""
    with Wire(net.COMPAT_FEATURES, card=False) as w:
        base = w.rig.rig.alloc(8192)
        pieces = [3, 7, 1, 50, 2, 1000, 4000]
        segs, at = [], base
        for n in pieces:
            segs.append((at, n))
            at += n
        w.fake.add([(base + 8000, 16)], segs, token=1, i=0)
        w.fake.kick(0)
        (frame,) = frames([1400])
        w.send("host", frame)
        _, length = eventually(lambda: w.fake.get(0), "the frame")
        assert length == 10 + 1400
        assert w.rig.rig.bus.gddr.read(base, length)[10:] == frame


def test_vop_58_compat_marks_frames_as_verified() -> None:
    """VOP 8.5: the compat backend sets DATA_VALID (2) in every header towards the card; modern does not."""
    for features, want in ((net.COMPAT_FEATURES, 2), (MODERN, 0)):
        with Wire(features, card=False) as w:
            bufs = _post(w, [70000] * 2)
            w.send("host", next(frames([100])))
            eventually(lambda w=w: w.fake.get(0), "the frame")
            assert w.rig.rig.bus.gddr.read(bufs[0][0], 1)[0] == want


@pytest.mark.parametrize("length", [0, 1, 9, 11, 12, 13, 25])
def test_short_transmit_chains_are_dropped(length: int) -> None:
    """A chain too short for header and Ethernet header is completed, dropped and counted; the next passes."""
    with Wire(MODERN, card=False) as w:
        buf = w.rig.rig.alloc(4096)
        w.fake.add([(buf, length)], [], token=1, i=1)
        (frame,) = frames([80])
        w.rig.rig.bus.gddr.write(buf + 2048, w.header() + frame)
        w.fake.add([(buf + 2048, 92)], [], token=2, i=1)
        w.fake.kick(1)
        assert w.recv("host") == frame
        assert [eventually(lambda: w.fake.get(1), "a completion")[0] for _ in range(2)] == [1, 2]
        assert w.stats().from_card_drops == 1


def test_useless_receive_chains_come_back() -> None:
    """A receive chain too short for the header is given back empty and not met again."""
    with Wire(MODERN, num=8, card=False) as w:
        buf = w.rig.rig.alloc(4096)
        for i in range(3):
            w.fake.add([], [(buf, 11)], token=i, i=0)
        w.fake.add([], [(buf, 4096)], token=9, i=0)
        w.fake.kick(0)
        w.send("host", next(frames([100])))
        got = [eventually(lambda: w.fake.get(0), "a completion") for _ in range(4)]
        assert got == [(0, 0), (1, 0), (2, 0), (9, 112)]


def test_broken_ring_stops_only_itself() -> None:
    """VOP-44, VOP 11: a broken receive ring sets NEEDS_RESET; frames from the card go on."""
    with Wire(MODERN, card=False) as w:
        w.fake.desc(0, 0, 64, flags=2 | 1, nxt=0, i=0)  # a chain that loops
        w.fake.offer(0, i=0)
        w.rig.rig.bus.ring_host(0)
        eventually(lambda: w.rig.rig.status & NEEDS_RESET, "NEEDS_RESET")
        buf = w.rig.rig.alloc(4096)
        for frame in frames([90] * 5):
            w.rig.rig.bus.gddr.write(buf, w.header() + frame)
            w.fake.add([(buf, 102)], [], i=1)
            w.fake.kick(1)
            assert w.recv("host") == frame
            eventually(lambda: w.fake.get(1), "the buffer back")


def test_ring_reset_forgets_the_chains_in_hand() -> None:
    """VOP-57: after a reset no byte of the old chains is written, and the new ones work."""
    with Wire(MODERN, card=False, host=False) as w:
        old = _post(w, [4096] * 40)
        loop = Loop(w.nd.run, w.stop_fds[0], lambda why: False)
        (frame,) = frames([100])
        w.send("host", frame)
        assert _merged(w, old)[0] == frame
        # The card asks for a reset: the loop comes back, the host process sets the rings up anew.
        w.rig.rig.put_ctrl("vdev_reset", 1)
        w.rig.rig.bus.ring_host(0)
        loop.join()
        assert loop.results == [lib.MIC_RUN_HANDSHAKE]
        w.rig.rig.put_ctrl("vdev_reset", 0)
        for addr, size in old:
            w.rig.rig.bus.gddr.zero(addr, size)
        w.fake.reset()
        w.device.reset()
        new = _post(w, [4096] * 2)
        w.loops.append(Loop(w.nd.run, w.stop_fds[0], Wire._again))
        w.send("host", frame)
        assert _merged(w, new)[0] == frame
        assert all(not any(w.rig.rig.bus.gddr.read(a, n)) for a, n in old)


@pytest.mark.parametrize(
    ("element", "merged"),
    [((0, 70000), 1), ((0, 112), 0), ((0, 112), 65535), ((0, 0), 1), ((0, 5), 1), ((0, 0xFFFFFFFF), 200)],
)
def test_driver_survives_a_lying_device(element: tuple[int, int], merged: int) -> None:
    """VOP 11: used lengths and num_buffers that cannot be true cost a frame, not the driver."""
    with Wire(MODERN, host=False) as w:
        dev = w.device
        addr = eventually(lambda: dev.pop(0), "a posted buffer").writable[0][0]
        frame = next(frames([100]))
        w.rig.rig.bus.gddr.write(addr, bytes(10) + merged.to_bytes(2, "little") + frame)
        dev.push(element[0], element[1], 0)
        lib.mic_vdev_interrupt(dev.vdev)
        # A good frame behind it arrives.
        chain = eventually(lambda: dev.pop(0), "a second buffer")
        good = next(frames([120], seed=9))
        w.rig.rig.bus.gddr.write(chain.writable[0][0], bytes(10) + b"\x01\0" + good)
        dev.push(chain.head, 12 + len(good), 0)
        lib.mic_vdev_interrupt(dev.vdev)
        w.card.settimeout(20)
        seen = w.recv("card")
        if seen != good:
            seen = w.recv("card")
        assert seen == good


def test_driver_reports_a_broken_ring() -> None:
    """A used element that names no buffer in flight ends the driver's loop with EIO."""
    with Wire(MODERN, host=False) as w:
        loop = w.loops[0]
        eventually(lambda: w.device.pop(0), "a posted buffer")
        w.device.push(200, 10, 0)
        lib.mic_vdev_interrupt(w.device.vdev)
        loop.join()
        assert loop.error is not None
        assert "broke a ring" in str(loop.error)


def test_local_end_gone_is_reported() -> None:
    """A closed local end ends the device's loop with MIC_RUN_LOCAL and an errno."""
    with Wire(MODERN) as w:
        w.host.shutdown(socket.SHUT_RDWR)
        w.host_loop.join()
        assert w.host_loop.results[-1] == lib.MIC_RUN_LOCAL
        assert w.nd.error


def test_nothing_is_served_before_driver_ok() -> None:
    """VOP 8.4: without DRIVER_OK no frame moves; afterwards those that waited do."""
    with Wire(MODERN, card=False, host=False) as w:
        w.rig.rig.status = 0
        w.device.vdev.status = 0
        _post(w, [4096])
        loop = Loop(w.nd.run, w.stop_fds[0], Wire._again)
        w.loops.append(loop)
        (frame,) = frames([64])
        w.send("host", frame)
        eventually(lambda: w.stats().sleeps, "the loop asleep")
        assert w.fake.get(0) is None
        w.rig.rig.status = layout.CONSTANTS["VIRTIO_DRIVER_OK"]
        w.rig.rig.bus.ring_host(0)
        assert eventually(lambda: w.fake.get(0), "the frame") == (0, 76)


def test_driver_works_with_a_small_area() -> None:
    """A driver with four buffers per direction still carries large frames."""
    with Wire(net.COMPAT_FEATURES, area=8 * 65664) as w:
        for frame in frames([BIG] * 40):
            w.send("host", frame)
            assert w.recv("card") == frame
            w.send("card", frame)
            assert w.recv("host") == frame


def test_driver_refuses_an_area_that_is_too_small() -> None:
    """Less than four buffers per direction is ENOSPC; an area outside GDDR is EFAULT."""
    with Wire(MODERN, card=False, host=False) as w:
        end = w.card_loop_end.fileno()
        with pytest.raises(OSError, match="No space"):
            net.NetDriver(w.fake.vdrv, end, w.rig.area, 65664)
        with pytest.raises(OSError, match="Bad address"):
            net.NetDriver(w.fake.vdrv, end, 1 << 40, 8 << 20)


def test_idle_pair_uses_no_cpu() -> None:
    """An idle pair of loops sleeps: no wake and no CPU time of note in half a second."""
    import select
    import time

    with Wire(MODERN) as w:
        w.send("host", next(frames([64])))
        w.recv("card")
        select.select([], [], [], 0.05)
        before, cpu = w.stats().sleeps, time.process_time()
        select.select([], [], [], 0.5)
        assert w.stats().sleeps == before
        assert time.process_time() - cpu < 0.1


def test_signal_returns_to_the_caller() -> None:
    """A signal while the loop sleeps ends the C call with MIC_RUN_SIGNAL, so that Python's handler runs."""
    seen: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda n, f: seen.append(n))
    main = threading.main_thread().ident
    assert main
    try:
        with Wire(MODERN, host=False) as w:

            def poke() -> None:
                eventually(lambda: w.stats().sleeps, "the loop asleep")
                signal.pthread_kill(main, signal.SIGUSR1)

            t = threading.Thread(target=poke, daemon=True)
            t.start()
            assert w.nd.run() == lib.MIC_RUN_SIGNAL
            t.join(20)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert seen == [signal.SIGUSR1]


def test_control_is_seen_under_load() -> None:
    """While frames pour in both directions a readable control descriptor ends the run: it never waits for a pause."""
    with Wire(MODERN) as w:
        stop = threading.Event()

        def bounce(side: str) -> None:
            sock = w.host if side == "host" else w.card
            while not stop.is_set():
                try:
                    sock.send(sock.recv(BIG + 64))
                except OSError:
                    return  # shut down below

        for frame in frames([200] * 40):  # they go round and round
            w.send("host", frame)
        threads = [threading.Thread(target=bounce, args=(s,), daemon=True) for s in ("host", "card")]
        for t in threads:
            t.start()
        eventually(lambda: w.stats().to_card_packets > 2000, "the traffic")
        os.write(w.stop_fds[0], (1).to_bytes(8, "little"))
        w.host_loop.join()
        assert w.host_loop.results[-1] == lib.MIC_RUN_CONTROL
        stop.set()
        for s in (w.host, w.card):
            s.shutdown(socket.SHUT_RDWR)
        for t in threads:
            t.join(20)

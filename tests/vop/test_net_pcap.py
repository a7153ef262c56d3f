"""The capture writer: right bytes, and never in the way of the data path."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import time
from pathlib import Path

from netwire import Wire, eventually, frames

from mic_emu.virtio import net

MODERN = net.accepted_features(net.MODERN_FEATURES)


def records(data: bytes) -> list[tuple[float, bytes]]:
    """Records of a nanosecond pcap file: (time, frame). Asserts the headers."""
    assert struct.unpack("<IHHIIII", data[:24]) == (0xA1B23C4D, 2, 4, 0, 0, 262144, 1)
    out, at = [], 24
    while at < len(data):
        sec, nsec, cap, full = struct.unpack("<IIII", data[at : at + 16])
        assert cap == full
        assert nsec < 10**9
        out.append((sec + nsec / 1e9, data[at + 16 : at + 16 + cap]))
        at += 16 + cap
    assert at == len(data), "a record is cut"
    return out


def run_captured(fd: int, sent: list[bytes], w: Wire, buffer: int = 1 << 20) -> net.Capture:
    """Send frames host -> card with a capture attached between two runs of the loop."""
    cap = net.Capture(fd, buffer)
    w.capture(cap)
    for frame in sent:
        w.send("host", frame)
        assert w.recv("card") == frame
        w.send("card", frame[::-1])
        assert w.recv("host") == frame[::-1]
    return cap


def test_pcap_holds_both_directions(tmp_path: Path) -> None:
    """Every frame of both directions, without the vnet header, with rising wall-clock times."""
    path = tmp_path / "a.pcap"
    sent = list(frames([60, 1514, 65000, 14, 9000] * 20))
    t0 = time.time()
    with path.open("wb") as f, Wire(MODERN) as w:
        # Larger than all of it: on a busy machine the writer may not run before the end.
        cap = run_captured(f.fileno(), sent, w, 8 << 20)
        eventually(lambda: cap.stats()["captured"] == 2 * len(sent), "the last record")
        w.capture(None)
        cap.close()
    got = records(path.read_bytes())
    assert [f for _, f in got] == [x for f in sent for x in (f, f[::-1])]
    times = [t for t, _ in got]
    assert times == sorted(times)
    assert t0 - 1 < times[0] <= times[-1] < time.time() + 1


def test_pcap_through_a_pipe_that_nobody_reads() -> None:
    """A reader that never reads costs records, not time; closing ends within its limit."""
    r, w_fd = os.pipe()
    fcntl.fcntl(w_fd, fcntl.F_SETPIPE_SZ, 4096)
    sent = list(frames([60000] * 50))
    with Wire(MODERN) as w:
        t0 = time.monotonic()
        cap = run_captured(w_fd, sent, w)
        assert time.monotonic() - t0 < 15
        eventually(lambda: cap.stats()["captured"] == 100, "all frames seen")
        w.capture(None)
        assert cap.stats()["dropped"] > 50
        t0 = time.monotonic()
        assert cap.close(flush_s=0.2)["error"] == errno.ETIMEDOUT
        assert time.monotonic() - t0 < 15
    os.close(r)
    os.close(w_fd)


def test_pcap_live_through_a_pipe() -> None:
    """A frame is readable at the other end of a pipe at once: a live view."""
    r, w_fd = os.pipe()
    (frame,) = frames([100])
    with Wire(MODERN) as w:
        cap = run_captured(w_fd, [frame], w)
        data = b""
        while len(data) < 24 + 2 * 116:
            assert select.select([r], [], [], 20)[0], "nothing came"
            data += os.read(r, 4096)
        assert [f for _, f in records(data)] == [frame, frame[::-1]]
        w.capture(None)
        cap.close()
    os.close(r)
    os.close(w_fd)


def test_pcap_on_a_full_disk_ends_with_whole_records(tmp_path: Path) -> None:
    """ENOSPC ends the capture, not the traffic: the error is kept, what was written is readable."""
    import resource
    import signal

    path = tmp_path / "b.pcap"
    sent = list(frames([1000] * 100))
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with path.open("wb") as f, Wire(MODERN) as w:
            # A file size limit fails in the middle of a record, as a full disk does.
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            cap = run_captured(f.fileno(), sent, w)
            eventually(lambda: cap.stats()["error"], "the error")
            w.capture(None)
            assert cap.close()["error"] == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    got = records(path.read_bytes())
    assert 40 < len(got) < 100
    assert [f for _, f in got] == [x for f in sent for x in (f, f[::-1])][: len(got)]


def test_pcap_of_a_closed_pipe() -> None:
    """A reader that went away ends the capture with EPIPE and no signal."""
    r, w_fd = os.pipe()
    os.close(r)
    with Wire(MODERN) as w:
        cap = run_captured(w_fd, list(frames([60] * 3)), w)
        eventually(lambda: cap.stats()["error"] == errno.EPIPE, "EPIPE")
        w.capture(None)
        assert cap.close() == cap.stats()
    os.close(w_fd)

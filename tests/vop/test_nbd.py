"""The card's NBD server: real clients, the protocol by hand, and clients without manners."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbdwire as w
import pytest
from nbdwire import NbdClient

from mic_emu._native import lib
from mic_emu.testing.disk import BLK_FEATURES, Disk, NbdServer
from mic_emu.testing.machine import eventually

SIZE = 16 << 20
NOISE = random.Random(1).randbytes(SIZE)
POOL = 4 << 20
FREE = (POOL - 8192) // 4096


@dataclass
class Served:
    """A disk, its image and its NBD server."""

    disk: Disk
    nbd: NbdServer
    fd: int
    image: Path
    path: str

    @property
    def uri(self) -> str:
        return f"nbd+unix:///vda?socket={self.path}"

    def quiet(self) -> bool:
        """All clients gone and every page of the pool back."""
        return self.nbd.stats().clients_now == 0 and lib.mic_blk_free_pages(self.disk.ptr) == FREE


def serve(tmp_path: Path, *, read_only: bool = False, spin_us: int = 50) -> Iterator[Served]:
    path = str(tmp_path / "nbd.sock")
    fd = os.memfd_create("disk")  # a flush must not wait for the machine's real disk
    image = Path(f"/proc/self/fd/{fd}")
    os.pwrite(fd, NOISE, 0)
    with (
        Disk(fd, SIZE // 512, pool=POOL, read_only=read_only, spin_us=spin_us) as disk,
        NbdServer(disk, path, read_only=read_only, spin_us=spin_us) as nbd,
    ):
        s = Served(disk, nbd, fd, image, path)
        yield s
        if nbd.result is None:
            eventually(s.quiet, 20, "all pool pages back after the last client")
    os.close(fd)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    yield from serve(tmp_path)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Served]:
    yield from serve(tmp_path, read_only=True)


def run(*args: str) -> str:
    done = subprocess.run(args, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
    return done.stdout


# --- real clients ------------------------------------------------------------------------------


@pytest.mark.peer("nbdinfo")
def test_nbdinfo_sees_the_export(served: Served) -> None:
    """nbdinfo: size, abilities and block sizes; --list names the export."""
    info = json.loads(run("nbdinfo", "--json", served.uri))["exports"][0]
    assert info["export-size"] == SIZE
    assert {k for k, v in info.items() if k.startswith("can_") and v} >= {
        "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_df",
    }  # fmt: skip
    assert (info["block_size_minimum"], info["block_size_maximum"]) == (512, 32 << 20)
    assert 'export="vda"' in run("nbdinfo", "--list", f"nbd+unix:///?socket={served.path}")


@pytest.mark.peer("nbdcopy")
@pytest.mark.parametrize(
    "options", [[], ["--synchronous"], ["--connections=4", "--requests=64"], ["--request-size=33554432"]]
)
def test_nbdcopy_both_ways(served: Served, tmp_path: Path, options: list[str]) -> None:
    """nbdcopy out and in: checksums agree, at any number of connections and request size."""
    out = tmp_path / "out.img"
    run("nbdcopy", *options, served.uri, str(out))
    assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256(served.image.read_bytes()).digest()
    fresh = random.Random(2).randbytes(SIZE // 2) + bytes(SIZE // 2)
    out.write_bytes(fresh)
    run("nbdcopy", "--flush", *options, str(out), served.uri)
    assert served.image.read_bytes() == fresh


@pytest.mark.peer("qemu-img")
def test_qemu_img_converts_both_ways(served: Served, tmp_path: Path) -> None:
    """qemu-img: info, convert to qcow2 and back, compare."""
    assert json.loads(run("qemu-img", "info", "--output=json", served.uri))["virtual-size"] == SIZE
    copy = str(tmp_path / "copy.qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, copy)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, served.uri)
    os.pwrite(served.fd, bytes(1 << 20), 3 << 20)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", copy, served.uri)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, served.uri)


@pytest.mark.peer("fio")
@pytest.mark.parametrize("depth", [1, 32])
def test_fio_verifies_random_writes(served: Served, depth: int) -> None:
    """fio: random writes with verification, one and 32 in flight."""
    run(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randwrite", "--bsrange=512-256k",
        "--bs_unaligned=0", "--blockalign=512", f"--size={SIZE}", f"--iodepth={depth}", "--verify=crc32c",
        "--verify_fatal=1", "--output=/dev/null",
    )  # fmt: skip


# --- the protocol by hand ----------------------------------------------------------------------


def test_old_style_export_name(served: Served) -> None:
    """EXPORT_NAME: size, flags, no padding when both sides said so; then transmission."""
    for name in (b"", b"vda"):
        with NbdClient(served.path) as c:
            c.option(w.EXPORT_NAME, name)
            assert struct.unpack(">Q", c.recv(8))[0] == SIZE
            assert int.from_bytes(c.recv(2), "big") & 1
            assert c.call(w.READ, 512, 512) == (0, os.pread(served.fd, 512, 512))


def test_export_name_with_padding(served: Served) -> None:
    """A client that did not ask for NO_ZEROES gets its 124 zeros."""
    with NbdClient(served.path, greet=False) as c:
        c.recv(18)
        c.sock.sendall(struct.pack(">I", 1))
        c.option(w.EXPORT_NAME, b"")
        assert c.recv(10 + 124)[10:] == bytes(124)
        assert c.call(w.READ, 0, 512)[0] == 0


def test_options(served: Served) -> None:
    """LIST, INFO, GO, ABORT answer as they must; what is unknown or malformed is refused by name."""
    with NbdClient(served.path) as c:
        c.option(w.LIST)
        assert c.reply() == (w.LIST, w.SERVER, struct.pack(">I", 3) + b"vda")
        assert c.reply().kind == w.ACK
        for option, data, want in (
            (w.LIST, b"x", w.ERR_INVALID),
            (w.STRUCTURED, b"x", w.ERR_INVALID),
            (w.STARTTLS, b"", w.ERR_UNSUP),
            (10, struct.pack(">II", 0, 0), w.ERR_UNSUP),
            (0xFFFFFFFF, b"hello", w.ERR_UNSUP),
            (w.GO, struct.pack(">I", 4) + b"nope\0\0", w.ERR_UNKNOWN),
            (w.INFO, struct.pack(">I", 0xFFFFFFFF) + b"\0\0", w.ERR_INVALID),
            (w.INFO, struct.pack(">IH", 0, 1), w.ERR_INVALID),
            (w.INFO, b"", w.ERR_INVALID),
            (w.INFO, b"\0" * 5, w.ERR_INVALID),
            (77, b"z" * 100000, w.ERR_TOO_BIG),
        ):
            c.option(option, data)
            assert c.reply() == (option, want, b"")
        c.option(w.INFO, struct.pack(">IHHH", 0, 2, 1, 3))
        kinds = []
        while (r := c.reply()).kind == w.REP_INFO:
            kinds.append(int.from_bytes(r.data[:2], "big"))
        assert (r.kind, kinds) == (w.ACK, [0, 1, 3])
        c.option(w.ABORT)
        assert c.reply() == (w.ABORT, w.ACK, b"")
        assert c.closed()


def test_unknown_export_name_hangs_up(served: Served) -> None:
    """EXPORT_NAME has no error reply: an unknown name ends the connection."""
    with NbdClient(served.path) as c:
        c.option(w.EXPORT_NAME, b"nope")
        assert c.closed()


@pytest.mark.parametrize("structured", [False, True])
def test_reads_of_every_size(served: Served, structured: bool) -> None:
    """READ of 0 bytes to 16 MiB, more than the pool holds, byte exact in both reply styles."""
    with NbdClient(served.path) as c:
        c.go(structured=structured)
        assert c.size == SIZE
        for off, n in ((0, 0), (0, 512), (SIZE - 512, 512), (512, 65536), (0, (1 << 20) + 512), (0, SIZE)):
            if not structured:
                assert c.call(w.READ, off, n) == (0, os.pread(served.fd, n, off))
                continue
            cookie = c.request(w.READ, off, n)
            got, done = bytearray(n), False
            while not done:
                chunk = c.chunk()
                assert chunk.cookie == cookie
                done = bool(chunk.flags & 1)
                if chunk.kind == 1:
                    at = int.from_bytes(chunk.data[:8], "big") - off
                    got[at : at + len(chunk.data) - 8] = chunk.data[8:]
                else:
                    assert (chunk.kind, n) == (0, 0)
            assert bytes(got) == os.pread(served.fd, n, off)


def test_writes_of_every_size(served: Served) -> None:
    """WRITE of 0 bytes to 16 MiB, with and without FUA, byte exact."""
    with NbdClient(served.path) as c:
        c.go()
        assert c.call(w.WRITE) == (0, b"")
        for off, n, flags in (
            (0, 512, 0),
            (SIZE - 512, 512, w.FUA),
            (1024, (2 << 20) + 512, 0),
            (0, SIZE, w.FUA),
        ):
            data = random.Random(n).randbytes(n)
            assert c.call(w.WRITE, off, data=data, flags=flags)[0] == 0
            assert os.pread(served.fd, n, off) == data


def test_trim_zeroes_flush(served: Served) -> None:
    """TRIM and FLUSH succeed; WRITE_ZEROES clears its range, larger than one virtio request too."""
    with NbdClient(served.path) as c:
        c.go()
        assert c.call(w.FLUSH)[0] == 0
        assert c.call(w.TRIM, 4096, 8192, flags=w.FUA)[0] == 0
        before = os.pread(served.fd, 512, 0)
        assert c.call(w.ZEROES, 512, SIZE - 1024, flags=w.NO_HOLE)[0] == 0
        assert os.pread(served.fd, SIZE, 0)[512:-512] == bytes(SIZE - 1024)
        assert os.pread(served.fd, 512, 0) == before


def test_request_errors(served: Served) -> None:
    """Bad offsets, lengths, flags and types get their errno; the connection goes on."""
    with NbdClient(served.path) as c:
        c.go()
        for kind, off, n, flags, want in (
            (w.READ, SIZE, 512, 0, 22),
            (w.READ, SIZE - 512, 1024, 0, 22),
            (w.READ, (1 << 64) - 512, 1024, 0, 22),
            (w.READ, 1, 512, 0, 22),
            (w.READ, 0, 100, 0, 22),
            (w.READ, 0, (32 << 20) + 512, 0, 75),
            (w.READ, 0, 512, w.NO_HOLE, 22),
            (w.READ, 0, 512, w.DF, 22),
            (w.TRIM, SIZE, 512, 0, 28),
            (w.ZEROES, 0, SIZE + 512, 0, 28),
            (w.FLUSH, 0, 512, 0, 22),
            (5, 0, 0, 0, 22),
            (0xFFFF, 0, 512, 0, 22),
        ):
            assert c.call(kind, off, n, flags=flags)[0] == want, (kind, off, n)
        assert c.call(w.WRITE, SIZE - 512, data=bytes(4096))[0] == 28
        assert c.call(w.WRITE, 1, data=bytes(100000))[0] == 22
        assert c.call(w.READ, 0, 512) == (0, os.pread(served.fd, 512, 0))


def test_structured_errors_and_df(served: Served) -> None:
    """Structured READ errors come as an error chunk; DF gives one chunk up to 64 KiB, EOVERFLOW above."""
    with NbdClient(served.path) as c:
        c.go(structured=True)
        cookie = c.request(w.READ, SIZE, 512)
        assert c.chunk() == (1, 0x8001, cookie, struct.pack(">IH", 22, 0))
        cookie = c.request(w.READ, 0, 65536, flags=w.DF)
        assert c.chunk() == (1, 1, cookie, bytes(8) + os.pread(served.fd, 65536, 0))
        cookie = c.request(w.READ, 0, 1 << 20, flags=w.DF)
        assert c.chunk() == (1, 0x8001, cookie, struct.pack(">IH", 75, 0))


def test_read_only_export(read_only: Served) -> None:
    """A read-only disk says so, reads, and refuses whatever writes with EPERM."""
    with NbdClient(read_only.path) as c:
        c.go()
        assert c.flags & 2
        assert c.call(w.WRITE, 0, data=bytes(512))[0] == 1
        assert c.call(w.TRIM, 0, 512)[0] == 1
        assert c.call(w.READ, 0, 512) == (0, os.pread(read_only.fd, 512, 0))


def test_replies_are_in_order_and_none_is_lost(served: Served) -> None:
    """300 requests in one go, more than the server takes at once, all come back, in order."""
    with NbdClient(served.path) as c:
        c.go()
        sent = [(c.request(w.READ, k * 4096, 4096), k * 4096) for k in range(300)]
        for cookie, off in sent:
            assert c.simple(4096) == (0, cookie, os.pread(served.fd, 4096, off))


def test_disconnect_request_finishes_what_was_asked(served: Served) -> None:
    """DISC: what came before it is done and answered, then the server hangs up."""
    with NbdClient(served.path) as c:
        c.go()
        cookie = c.request(w.WRITE, 0, data=b"q" * 512)
        c.request(w.DISC)
        assert c.simple() == (0, cookie, b"")
        assert c.closed()
    assert os.pread(served.fd, 512, 0) == b"q" * 512


# --- clients without manners -------------------------------------------------------------------

GREETING = struct.pack(">I", 3)
OPT = struct.pack(">Q", w.IHAVEOPT)


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff" * 4,
        b"GET / HTTP/1.1\r\n\r\n",
        GREETING + b"\0" * 16,
        GREETING + OPT + struct.pack(">II", 3, 0xFFFFFFFF),
        GREETING + OPT + struct.pack(">II", 1, 5) + b"wrong",
    ],
    ids=["flags", "http", "magic", "length", "name"],
)
def test_bad_negotiation_hangs_up(served: Served, junk: bytes) -> None:
    """Bytes that are no NBD end the connection at once; others are served."""
    with NbdClient(served.path, greet=False) as bad, NbdClient(served.path) as good:
        bad.sock.sendall(junk)
        assert bad.closed()
        good.go()
        assert good.call(w.READ, 0, 512)[0] == 0
    assert served.nbd.stats().bad_clients == 1


@pytest.mark.parametrize(
    "junk",
    [
        b"\0" * 28,
        struct.pack(">IHHQQI", 0x25609513, 0, w.WRITE, 1, 0, (32 << 20) + 1),
        struct.pack(">IHHQQI", 0x25609513, 0, w.WRITE, 1, 0, 0xFFFFFFFF),
    ],
    ids=["magic", "large", "largest"],
)
def test_bad_request_hangs_up(served: Served, junk: bytes) -> None:
    """A wrong magic, or a payload beyond 32 MiB, ends the connection."""
    with NbdClient(served.path) as bad:
        bad.go()
        bad.sock.sendall(junk)
        assert bad.closed()


def test_clients_that_vanish_in_every_phase(served: Served) -> None:
    """Connections cut in greeting, option, header, payload and reply leave no page and no request."""
    for cut in (0, 2, 4, 10, 20):
        with NbdClient(served.path, greet=False) as c:
            c.sock.sendall((GREETING + OPT + struct.pack(">II", 7, 6) + bytes(6))[:cut])
    for sent in (10, 28, 1000, 70000):
        with NbdClient(served.path) as c:
            c.go()
            head = struct.pack(">IHHQQI", 0x25609513, 0, w.WRITE, 1, 0, 4 << 20)
            c.sock.sendall((head + bytes(100000))[:sent])
    for _ in range(5):
        with NbdClient(served.path) as c:
            c.go()
            for k in range(64):
                c.request(w.READ, k * 4096, 1 << 20)
    eventually(served.quiet, 20, "all pages back")


def test_client_that_never_reads_starves_nobody(served: Served) -> None:
    """Fifteen clients that ask for everything and read nothing; the sixteenth works at once."""
    greedy = [NbdClient(served.path) for _ in range(15)]
    for g in greedy:
        g.go()
        g.sock.setblocking(False)
        for k in range(40):
            try:
                g.request(w.READ, 0, SIZE if k % 2 else 512 * (k + 1))
            except BlockingIOError:
                break
    with NbdClient(served.path) as c:
        c.go()
        for k in range(20):
            assert c.call(w.READ, k * 512, 65536) == (0, os.pread(served.fd, 65536, k * 512))
            assert c.call(w.WRITE, 1 << 20, data=bytes([k]) * 65536)[0] == 0
    for g in greedy:
        g.close()


def test_more_clients_than_places(served: Served) -> None:
    """Client 17 waits in the listen queue and is served when one leaves."""
    first = [NbdClient(served.path) for _ in range(lib.MIC_NBD_CLIENTS)]
    late = NbdClient(served.path, greet=False)
    late.sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        late.recv(1)
    first.pop().close()
    late.sock.settimeout(20)
    assert late.recv(18)[:8] == b"NBDMAGIC"
    for c in [*first, late]:
        c.close()


def test_out_of_descriptors(served: Served) -> None:
    """No descriptor for a new client: it waits without burning CPU, and is served when there is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    late = NbdClient(served.path, greet=False, connect=False)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        late.sock.connect(served.path)
        late.sock.settimeout(0.3)
        before = time.process_time()
        with pytest.raises(TimeoutError):
            late.recv(1)
        assert time.process_time() - before < 0.1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    late.sock.settimeout(20)
    assert late.recv(8) == b"NBDMAGIC"
    late.close()


def test_random_bytes(served: Served) -> None:
    """Seeded noise after a valid negotiation, header magics included, never hurts another client."""
    rng = random.Random(7)
    with NbdClient(served.path) as good:
        good.go()
        for _ in range(60):
            with NbdClient(served.path) as bad:
                bad.go(structured=rng.random() < 0.5)
                try:
                    for _ in range(rng.randrange(1, 20)):
                        kind, length = (
                            rng.randrange(0, 8),
                            rng.choice([0, 1, 512, 4096, 70000, 1 << 21, 1 << 31]),
                        )
                        off = rng.choice([0, 512, 1, SIZE - 512, SIZE, rng.getrandbits(64)])
                        if kind == w.WRITE:
                            off, length = SIZE - 65536, min(length, 4096)
                        if kind in (w.TRIM, w.ZEROES):
                            off = SIZE - 65536
                        head = struct.pack(
                            ">IHHQQI", 0x25609513, rng.randrange(0, 8), kind, rng.getrandbits(64), off, length
                        )
                        bad.sock.sendall(head + rng.randbytes(rng.choice([0, 0, 512, 4096])))
                except ConnectionError:
                    pass
            assert good.call(w.READ, 0, 4096) == (0, os.pread(served.fd, 4096, 0))


# --- the device goes away ----------------------------------------------------------------------


def test_device_gone_disconnects_clients(served: Served) -> None:
    """Backend dead, driver stopped: clients are disconnected, the loop ends with ESHUTDOWN, no hang."""
    with NbdClient(served.path) as c:
        c.go()
        assert c.call(w.READ, 0, 512)[0] == 0
        served.disk.backend.kill()
        for k in range(100):
            c.request(w.READ, k * 512, 4096)
        lib.mic_blk_drv_stop(served.disk.ptr)
        assert c.closed()
        assert served.nbd.ended(20) == -errno.ESHUTDOWN


def test_stop_with_requests_in_flight(tmp_path: Path) -> None:
    """Closing the server while clients hammer it returns in time and frees every page."""
    for served in serve(tmp_path, spin_us=0):
        stop = threading.Event()

        def hammer(path: str = served.path, stop: threading.Event = stop) -> None:
            try:
                with NbdClient(path) as c:
                    c.go()
                    while not stop.is_set():
                        for k in range(32):
                            c.request(w.READ, k * 4096, 65536)
                        for _ in range(32):
                            c.simple(65536)
            except OSError:
                pass

        threads = [threading.Thread(target=hammer) for _ in range(3)]
        for t in threads:
            t.start()
        eventually(lambda s=served: s.nbd.stats().requests > 500, 30, "some load")
        os.eventfd_write(served.nbd._stop, 1)
        assert served.nbd.ended(20) == 0
        stop.set()
        lib.mic_nbd_destroy(served.nbd.ptr)
        assert lib.mic_blk_free_pages(served.disk.ptr) == FREE
        for t in threads:
            t.join(20)
        served.nbd.ptr = lib.mic_nbd_create(served.disk.ptr, served.nbd._listener.fileno(), b"vda", False)


def test_disk_error_reaches_the_client(tmp_path: Path) -> None:
    """A failing disk: EIO in simple and structured replies; the connection survives."""
    path, fd = str(tmp_path / "nbd.sock"), os.open("/dev/full", os.O_RDWR)
    with Disk(fd, 4096, features=BLK_FEATURES) as disk, NbdServer(disk, path), NbdClient(path) as c:
        c.go()
        assert c.call(w.WRITE, 0, data=bytes(4096))[0] == 5
        assert c.call(w.READ, 0, 512) == (0, bytes(512))
    os.close(fd)

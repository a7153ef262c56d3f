"""The library as a file: names, versions, header, privileges (SCIF-1..6, 18) and its limits."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from scif_server import PACKAGE, Server

LIBRARY = PACKAGE / "lib" / "libscif.so.0"
NAMES = [
    "accept",
    "bind",
    "close",
    "connect",
    "fence_mark",
    "fence_signal",
    "fence_wait",
    "get_fd",
    "get_nodeIDs",
    "listen",
    "mmap",
    "munmap",
    "open",
    "poll",
    "readfrom",
    "recv",
    "register",
    "send",
    "unregister",
    "vreadfrom",
    "vwriteto",
    "writeto",
]


def test_scif_1_soname_and_exported_names() -> None:
    """SCIF-1: SONAME libscif.so.0, exactly the 22 functions, each under SCIF_0.0."""
    dynamic = subprocess.run(["readelf", "-dW", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "soname: [libscif.so.0]" in dynamic
    table = subprocess.run(
        ["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    symbols = sorted(line.split()[2] for line in table.splitlines() if line.split()[1] != "A")
    assert symbols == sorted(f"scif_{n}@@SCIF_0.0" for n in NAMES)


def test_scif_2_a_program_linked_against_another_build_starts(server: Server, tmp_path: Path) -> None:
    """SCIF-2: a program that was linked against a library with the same version node runs, without a word."""
    stub = "".join(f"int scif_{n}(void) {{ return -1; }}\n" for n in NAMES)
    (tmp_path / "stub.c").write_text(stub)
    (tmp_path / "v.map").write_text("SCIF_0.0 { global: scif_*; local: *; };\n")
    (tmp_path / "p.c").write_text("int scif_open(void);\nint main(void) { return scif_open() < 0; }\n")
    build = [
        "cc",
        "-shared",
        "-fPIC",
        "stub.c",
        "-o",
        "libscif.so",
        "-Wl,-soname,libscif.so.0,--version-script=v.map",
    ]
    subprocess.run(build, cwd=tmp_path, check=True)
    subprocess.run(["cc", "p.c", "-L.", "-lscif", "-o", "p"], cwd=tmp_path, check=True)
    needs = subprocess.run(
        ["readelf", "-VW", tmp_path / "p"], capture_output=True, text=True, check=True
    ).stdout
    assert "SCIF_0.0" in needs
    env = {**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / "node0.sock")}
    done = subprocess.run([tmp_path / "p"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_scif_3_ctypes_by_name_with_errno(server: Server) -> None:
    """SCIF-3: loaded by its literal name, untyped calls work and errno is visible."""
    code = (
        "import ctypes, errno\n"
        "s = ctypes.CDLL('libscif.so.0', use_errno=True)\n"
        "fd = s.scif_open()\n"
        "assert fd >= 0\n"
        "assert s.scif_bind(fd, 0) >= 1089\n"
        "assert s.scif_listen(fd + 100, 1) == -1\n"
        "assert ctypes.get_errno() == errno.EBADF\n"
        "assert s.scif_close(fd) == 0\n"
    )
    env = {**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / "node0.sock")}
    done = subprocess.run(["python3", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ctypes.CDLL(str(LIBRARY)).scif_get_fd(7) == 7


CONSTANTS = {
    "SCIF_OPEN_FAILED": -1, "SCIF_REGISTER_FAILED": -1, "SCIF_ACCEPT_SYNC": 1, "SCIF_SEND_BLOCK": 1,
    "SCIF_RECV_BLOCK": 1, "SCIF_PROT_READ": 1, "SCIF_PROT_WRITE": 2, "SCIF_MAP_FIXED": 0x10,
    "SCIF_MAP_KERNEL": 0x20, "SCIF_FENCE_INIT_SELF": 1, "SCIF_FENCE_INIT_PEER": 2, "SCIF_FENCE_RAS_SELF": 4,
    "SCIF_FENCE_RAS_PEER": 8, "SCIF_SIGNAL_LOCAL": 0x10, "SCIF_SIGNAL_REMOTE": 0x20, "SCIF_RMA_USECPU": 1,
    "SCIF_RMA_USECACHE": 2, "SCIF_RMA_SYNC": 4, "SCIF_RMA_ORDERED": 8, "SCIF_POLLIN": 1, "SCIF_POLLOUT": 4,
    "SCIF_POLLERR": 8, "SCIF_POLLHUP": 0x10, "SCIF_POLLNVAL": 0x20, "SCIF_ADMIN_PORT_END": 1024,
    "SCIF_PORT_RSVD": 1088, "SCIF_COSM_LISTEN_PORT": 201, "MPSSD_MONRECV": 160, "MIC_NOTIFY": 161,
    "MPSSD_CRED": 162, "MPSSD_MONSEND": 163, "MPSSD_MICCTRL": 164,
    **{f"MPSSD_RESV{i}": 160 + i for i in range(5, 10)},
    **{f"SCIF_{n}_PORT_{i}": base + i for n, base in
       {"COI": 40, "OFED": 60, "NETDEV": 80, "RAS": 100, "PM": 120, "BT": 130, "MYO": 1025, "ST": 1044}.items()
       for i in range(10)},
}  # fmt: skip
ENUMERATORS = re.compile(r"SCIF_(PROT|MAP|FENCE|SIGNAL)_")


@pytest.mark.parametrize("compiler", [["cc", "-x", "c"], ["c++", "-x", "c++"]], ids=["c", "c++"])
def test_scif_4_5_6_header(compiler: list[str], tmp_path: Path) -> None:
    """SCIF-4, 5, 6: the header stands alone in C and C++; sizes, offsets, aliases, values, kinds."""
    checks = [f'static_assert((long){n} == {v}, "{n}");' for n, v in CONSTANTS.items()]
    kinds = [f"#if{'n' if not ENUMERATORS.match(n) else ''}def {n}\n#error {n}\n#endif" for n in CONSTANTS]
    source = "\n".join([
        "#include <scif.h>", "#ifndef __cplusplus", "#define static_assert _Static_assert", "#endif",
        "#include <stddef.h>", *checks, *kinds,
        'static_assert(sizeof(struct scif_portID) == 4 && offsetof(struct scif_portID, port) == 2, "portID");',
        'static_assert(offsetof(struct scif_pollepd, epd) == 0 && offsetof(struct scif_pollepd, events) == 4, "pollepd");',
        'static_assert(sizeof(struct scif_pollepd) == 8 && offsetof(struct scif_pollepd, revents) == 6, "pollepd");',
        'static_assert(ACCEPT_SYNC == 1 && SEND_BLOCK == 1 && RECV_BLOCK == 1, "aliases");',
        'static_assert(sizeof(off_t) == 8, "off_t");',
        "#if !defined SCIF_MMAP_FAILED || defined SCIF_MAP_ULIMIT", "#error kinds", "#endif",
        "MICACCESSAPI int f(portID_t *p) { fd_set s; struct pollfd q; FD_ZERO(&s); q.fd = p->node; errno = 0;",
        "uint64_t x = (uint64_t)(size_t)SCIF_MMAP_FAILED; (void)x; return close(q.fd) + select(0, &s, 0, 0, 0); }",
        "int main(void) { return SCIF_MMAP_FAILED != (void *)(intptr_t)-1; }",
    ])  # fmt: skip
    done = subprocess.run(
        [*compiler, "-Wall", "-Werror", "-o", tmp_path / "values", f"-I{PACKAGE / 'include'}", "-"],
        input=source, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert subprocess.run([tmp_path / "values"]).returncode == 0


def environment(server: Server, node: int) -> dict[str, str]:
    return {**server.env(), "MICEMU_SCIF_SOCKET": str(server.where / f"node{node}.sock")}


def run_python(server: Server, code: str, node: int = 0) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(server, node), capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def start_python(server: Server, code: str, node: int = 0) -> subprocess.Popen[str]:
    """A program to talk with."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(server, node), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_instance_is_found_as_commands_find_it(server: Server) -> None:
    """Without a socket by name: $MICEMU_INSTANCE or default, below $MICEMU_RUNDIR, the run-time directory or /tmp."""
    plain = {k: v for k, v in server.env().items() if not k.startswith("MICEMU_")}
    with tempfile.TemporaryDirectory(dir="/tmp") as home:  # short: sockets have at most 107 characters
        for place in (f"{home}/micemu/other", f"{home}/default"):
            os.makedirs(place)
            os.symlink(server.where / "node0.sock", f"{place}/scif.sock")

        def opens(**env: str) -> str:
            code = "import errno\nfrom mic_emu import scif\ntry: scif.Endpoint(); print('open')\n"
            code += "except scif.ScifError as e: print(errno.errorcode[e.errno])"
            argv = [sys.executable, "-c", code]
            return subprocess.check_output(argv, env={**plain, **env}, text=True).strip()

        assert opens(XDG_RUNTIME_DIR=home, MICEMU_INSTANCE="other") == "open"
        assert opens(XDG_RUNTIME_DIR=home) == "ENOENT"
        assert opens(MICEMU_RUNDIR=home, MICEMU_INSTANCE="") == "open"
        assert opens(MICEMU_RUNDIR=home, MICEMU_INSTANCE="micemu/other") == "ENOENT"
        assert opens(MICEMU_RUNDIR=home, MICEMU_INSTANCE="x" * 200) == "ENOENT"


def test_scif_18_19_ordinary_users_cannot_bind_low_ports(tmp_path: Path) -> None:
    """SCIF-18: 1..1023 give EACCES without privilege, also when bound; SCIF-19: 1024 and above are free."""
    ordinary = Server(tmp_path, 1, SCIF_TEST_ORDINARY="1")
    try:
        run_python(
            ordinary,
            "import errno\n"
            "from mic_emu import scif\n"
            "e = scif.Endpoint()\n"
            "def code(p):\n"
            "    try:\n"
            "        return e.bind(p)\n"
            "    except scif.ScifError as x:\n"
            "        return -x.errno\n"
            "assert all(code(p) == -errno.EACCES for p in (1, 5, 200, 1023))\n"
            "assert code(1024) == 1024\n"
            "assert code(7) == -errno.EACCES\n"
            "assert code(1025) == -errno.EINVAL\n"
            "assert [scif.Endpoint().bind(p) for p in (1025, 1088, 65535)] == [1025, 1088, 65535]\n",
        )
    finally:
        assert ordinary.stop() == 0


def test_scif_116_119_an_own_mark_never_keeps_anybody_waiting(server: Server) -> None:
    """SCIF-119: copies end before their call returns (docs/deviations.md), so no own mark can be late:
    any value, even one never obtained, ends at once. SCIF-116: a card's loopback is not the host's."""
    run_python(
        server,
        "import threading\n"
        "from mic_emu import scif\n"
        "l = scif.Endpoint(); port = l.bind(); l.listen()\n"
        "c = scif.Endpoint()\n"
        "t = threading.Thread(target=lambda: c.connect((1, port))); t.start()\n"
        "a, _ = l.accept(); t.join()\n"
        "assert 0 < a.fence_mark() < 0xdead and a.fence_mark(2) < 0\n"
        "a.fence_wait(a.fence_mark()); a.fence_wait(123456)\n",
        node=1,
    )


def test_scif_102_129_130_a_lost_node(tmp_path: Path) -> None:
    """SCIF-129: what calls return after the peer's node is lost, SCIF-130: new connections after it is
    back. SCIF-102: access to the mapping of its window ends the program with SIGBUS."""
    server = Server(tmp_path, 1)
    owner = (
        "import sys\n"
        "from mic_emu import scif\n"
        "l = scif.Endpoint(); l.bind(4000); l.listen()\n"
        "a, _ = l.accept(); m = scif.alloc(4096); m[:4] = b'mine'; w = a.register(m, 0)\n"
        "a.send(b'last'); print('up', flush=True); sys.stdin.read()\n"
    )
    peer = start_python(server, owner, node=1)
    user = (
        "import errno, sys, threading\n"
        "from mic_emu import scif\n"
        "def code(f, *a):\n"
        "    try:\n"
        "        f(*a); return 0\n"
        "    except scif.ScifError as e:\n"
        "        return e.errno\n"
        "c = scif.Endpoint()\n"
        "while code(c.connect, (1, 4000)): pass\n"
        "while not any(scif.poll([(c, 1)], 5)): pass\n"
        "m = c.mmap(0, 4096)\n"
        "assert bytes(m.view[:4]) == b'mine'\n"
        "mine = scif.alloc(4096); w = c.register(mine)\n"
        "print('mapped', flush=True); sys.stdin.readline()\n"
        "assert scif.poll([(c, 1)], 5)[0] & 0x10\n"
        "assert c.recv(10) == b'last'\n"
        "R = errno.ECONNRESET\n"
        "assert code(c.recv, 1) == R and code(c.send, b'x') == R and code(c.mmap, 0, 4096) == R\n"
        "assert code(c.register, scif.alloc(4096)) == R and code(w.unregister) == R\n"
        "assert code(c.vreadfrom, bytearray(4), 0) == R and code(c.fence_mark) == R\n"
        "assert code(scif.Endpoint().connect, (1, 4000)) == errno.ENODEV\n"
        "assert scif.get_node_ids() == ([0], 0)\n"
        "print('checked', flush=True); sys.stdin.readline()\n"
        "assert code(scif.Endpoint().connect, (1, 4001)) == errno.ECONNREFUSED\n"
        "assert code(c.recv, 1) == R\n"
        "assert scif.get_node_ids() == ([0, 1], 0)\n"
        "print('alive', flush=True); m.view[0]\n"
    )
    client = start_python(server, user)
    assert client.stdout is not None
    assert client.stdin is not None
    for line, command in (("mapped\n", "down 1"), ("checked\n", "up 1")):
        assert client.stdout.readline() == line
        server.ask(command)
        client.stdin.write("\n")
        client.stdin.flush()
    assert client.stdout.readline() == "alive\n"
    assert client.wait(20) == -signal.SIGBUS
    peer.kill()
    peer.communicate()
    client.communicate()
    assert server.stop() == 0


def test_scif_135_a_killed_node_ends_every_blocked_call(tmp_path: Path) -> None:
    """SCIF-135: kill -9 of the node process: blocked accept, recv, send and poll end, later calls fail at once."""
    server = Server(tmp_path, 1)
    code = (
        "import errno, sys, threading\n"
        "from mic_emu import scif\n"
        "l = scif.Endpoint(); port = l.bind(); l.listen()\n"
        "c = scif.Endpoint(); t = threading.Thread(target=c.connect, args=((0, port),)); t.start()\n"
        "a, _ = l.accept(); t.join()\n"
        "ends = []\n"
        "def blocked(f, *args):\n"
        "    try:\n"
        "        ends.append(f(*args))\n"
        "    except scif.ScifError as e:\n"
        "        ends.append(-e.errno)\n"
        "calls = [(l.accept,), (c.recv, 1), (a.recv, 1), (a.send, bytes(100000)), (scif.poll, [(c, 1)])]\n"
        "threads = [threading.Thread(target=blocked, args=x) for x in calls]\n"
        "[t.start() for t in threads]\n"
        "print('blocked', flush=True); sys.stdin.readline()\n"
        "[t.join(20) for t in threads]\n"
        "assert not any(t.is_alive() for t in threads), ends\n"
        "for call in (lambda: scif.Endpoint(), lambda: l.accept(block=False), lambda: c.connect((0, 5))):\n"
        "    try:\n"
        "        call()\n"
        "        raise SystemExit('a call worked without a node')\n"
        "    except scif.ScifError as e:\n"
        "        assert e.errno in (errno.ENOENT, errno.ENODEV, errno.ENOTTY), e\n"
    )
    program = start_python(server, code)
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "blocked\n"
        server.process.kill()
        server.process.wait()
        program.communicate("\n", timeout=30)
        assert program.returncode == 0
    finally:
        program.kill()
        program.communicate()
        for pipe in (server.process.stdin, server.process.stdout):
            assert pipe is not None
            pipe.close()

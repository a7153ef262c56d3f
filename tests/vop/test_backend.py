"""Own backends in Python: chains, configuration, hostile drivers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mic_emu.testing.backend import BackendRig
from mic_emu.testing.machine import Machine, eventually
from mic_emu.testing.rings import NEXT
from mic_emu.virtio.rng import Rng
from mic_emu.vop.backend import Backend, Chain, ChainDone
from mic_emu.vop.loading import LoadError, load_class


class Upper(Backend):
    """Answers in upper case; keeps a chain that says ``later`` until ``flush`` is asked for."""

    device_type = 42
    num_vq = 2
    num = 8
    config = b"conf"

    def __init__(self, **options: str) -> None:
        super().__init__(**options)
        self.kept: list[Chain] = []
        self.resets = 0
        self.pipe = os.pipe2(os.O_NONBLOCK)

    def process(self, chain: Chain) -> int | None:
        data = chain.read()
        if data == b"later":
            self.kept.append(chain)
            return None
        if data == b"fail":
            raise ValueError("on purpose")
        return chain.write(data.upper() + str(chain.queue).encode())

    def watch(self) -> list[int]:
        return [self.pipe[0]]

    def readable(self, fd: int) -> None:
        word = os.read(fd, 100)
        if word == b"config":
            self.set_config(b"new!")
        while self.kept:
            chain = self.kept.pop()
            chain.write(word)
            chain.complete()

    def reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        for fd in self.pipe:
            os.close(fd)


@pytest.fixture
def upper() -> Iterator[BackendRig]:
    with BackendRig(Upper()) as rig:
        yield rig


def device(rig: BackendRig) -> Upper:
    assert isinstance(rig.backend, Upper)
    return rig.backend


def test_vop_backend_answers_on_every_queue(upper: BackendRig) -> None:
    """Each queue's chains come with its index; more requests than entries wrap round."""
    for i in range(50):
        assert upper.request(f"ab{i}".encode(), room=32, queue=i % 2) == f"AB{i}{i % 2}".encode()


def test_vop_backend_answer_is_cut_at_its_room(upper: BackendRig) -> None:
    """What has no room is dropped, and used.len tells the truth."""
    assert upper.request(b"abcdef", room=3) == b"ABC"
    assert upper.request(b"abcdef", room=0) == b""


def test_vop_backend_completes_later_from_a_descriptor(upper: BackendRig) -> None:
    """A kept chain is completed when a watched descriptor wakes the loop; requests behind it overtake."""
    late = upper.submit(b"later", room=16)
    assert upper.request(b"now", room=8) == b"NOW0"
    os.write(device(upper).pipe[1], b"at last")
    assert upper.answer(late) == b"at last"


def test_vop_backend_config_change_is_announced(upper: BackendRig) -> None:
    """set_config keeps the length and tells the host."""
    os.write(device(upper).pipe[1], b"config")
    assert upper.request(b"x", room=4) == b"X0"
    eventually(lambda: upper.configs == [b"new!"], 20, "the announcement")
    with pytest.raises(ValueError, match="4 bytes"):
        device(upper).set_config(b"longer")


def test_vop_57_kept_chains_are_invalid_after_a_reset(upper: BackendRig) -> None:
    """VOP-57: after a reset a kept chain can neither be read, written nor completed; new ones work."""
    upper.submit(b"later", room=16)
    eventually(lambda: device(upper).kept, 20, "the chain")
    (chain,) = device(upper).kept
    view = chain.writable[0]
    upper.reset()
    assert device(upper).resets == 1
    device(upper).kept.clear()
    for use in (chain.read, lambda: chain.write(b"x"), chain.complete):
        with pytest.raises(ChainDone):
            use()
    with pytest.raises(ValueError, match="released"):
        view[0] = 1
    assert upper.request(b"again", room=16) == b"AGAIN0"


def test_vop_45_hostile_chain_never_reaches_the_backend(upper: BackendRig) -> None:
    """VOP-45: a next index outside the ring: NEEDS_RESET, the other ring goes on, reset repairs."""
    upper.driver.desc(0, 0x1000, 4, NEXT, 99)
    upper.driver.offer(0)
    upper.rig.bus.ring_host(0)
    eventually(lambda: upper.broken, 20, "NEEDS_RESET")
    assert upper.request(b"abc", room=8, queue=1) == b"ABC1"
    upper.reset()
    assert upper.request(b"abc", room=8) == b"ABC0"


def test_vop_backend_exception_is_shown() -> None:
    """An exception of the backend reaches the test that waits."""
    rig = BackendRig(Upper())
    with pytest.raises(ValueError, match="on purpose"), rig:
        rig.request(b"fail", room=4)


def test_vop_backend_segments_without_copies() -> None:
    """readable and writable are views of card memory; readable ones are read-only."""
    seen: list[tuple[int, bool, int]] = []

    class Look(Backend):
        device_type = 42

        def process(self, chain: Chain) -> int:
            seen.append((len(chain.readable), chain.readable[0].readonly, chain.room))
            chain.writable[1][0:2] = b"zz"
            return 6

    with BackendRig(Look()) as rig:
        a, b = rig.rig.alloc(8192), rig.rig.alloc(8192)
        rig.driver.add([(a, 5), (a + 64, 3)], [(b, 4), (b + 100, 8)], 7)
        rig.driver.kick()
        eventually(lambda: rig.driver.get() == (7, 6), 20, "the completion")
        assert seen == [(2, True, 12)]
        assert rig.rig.bus.gddr.read(b + 100, 3) == b"zz\0"


def test_vop_rng_gives_different_bytes() -> None:
    """virtio-rng fills whatever room there is, each time anew."""
    with BackendRig(Rng()) as rig:
        first, second = rig.request(room=512), rig.request(room=512)
        assert len(first) == len(second) == 512
        assert first != second
        assert len(rig.request(room=70000)) == 70000


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "MODULE:CLASS"), ("no_such_module:X", "no module 'no_such_module'"), ("os:nothing", "nothing"),
        ("os:getcwd", "no subclass"), ("bad_module:X", "division by zero"),
    ],
)  # fmt: skip
def test_vop_loading_says_what_is_wrong(name: str, why: str, tmp_path: Path) -> None:
    """Each way in which MODULE:CLASS can be wrong has its sentence."""
    (tmp_path / "bad_module.py").write_text("1 / 0\n")
    try:
        with pytest.raises(LoadError, match=why):
            load_class(name, Backend, str(tmp_path))
    finally:
        if str(tmp_path) in sys.path:
            sys.path.remove(str(tmp_path))


@pytest.mark.system
def test_vop_rng_stream_on_the_card(machine: Machine) -> None:
    """vop add rng: entropy on the card as a stream, for several readers; remove takes the FIFO away."""
    card = machine.boot("--disk", "none", "--net", "none")["cards"][0]
    assert machine.json("vop", "add", "mic0", "rng") == {"device": "rng"}
    fifo = Path(card["run_dir"]) / "hwrng"
    stream = "/dev/hwrng" if "mnt" in card["contained"].get("namespaces", []) else fifo
    words = machine.shell(f"for i in 1 2 3; do head -c 200000 {stream} | sha256sum; done").split("\n")[:3]
    assert len(set(words)) == 3
    machine.micemu("vop", "remove", "mic0", "rng")
    assert not fifo.exists()
    assert machine.card()["state"] == "online"


@pytest.mark.system
def test_log_says_which_exception_ended_a_backend(machine: Machine, tmp_path: Path) -> None:
    """The message holds the exception's last line, and ``micemu log`` shows the traceback below it."""
    (tmp_path / "mine.py").write_text(
        "from mic_emu.vop.backend import Backend\nclass Boom(Backend):\n    device_type = 4\n"
        "    def driver_ok(self): raise ValueError('boom on purpose')\n    def process(self, chain): return 0\n"
    )
    machine.boot("--disk", "none", "--net", "none")
    machine.micemu("vop", "add", "mic0", "--backend", "mine:Boom", cwd=tmp_path, check=False)

    def shown() -> str:
        return machine.micemu("log", "--level", "error").stdout

    eventually(lambda: "ended by an exception" in shown(), 30, "the exception in the log")
    line, trace = shown().split("ended by an exception: ValueError: boom on purpose\n", 1)
    assert line.count("\n") == 0
    assert trace.startswith("    Traceback (most recent call last):\n")
    assert "in driver_ok" in trace


@pytest.mark.system
def test_vop_20_own_backend_dies_and_comes_back(machine: Machine, tmp_path: Path) -> None:
    """kill -9, an exception, a wrong name: removed and started again, or refused with the reason."""
    machine.boot("--disk", "none", "--net", "none")
    machine.micemu("vop", "add", "mic0", "rng")
    pid = machine.device("rng")["pid"]
    os.kill(pid, 9)
    eventually(
        lambda: machine.device("rng")["state"] == "running" and machine.device("rng")["pid"] != pid,
        30,
        "a new process",
    )
    (tmp_path / "mine.py").write_text("class X: pass\n")
    refused = machine.micemu("vop", "add", "mic0", "--backend", "mine:X", cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert "no subclass of mic_emu.vop.backend.Backend" in refused.stderr
    assert [d["type"] for d in machine.card()["devices"]] == ["console", "rng"]

"""Boot, card bring-up and stop: HW-37, 43 to 46, 48, 49, 51, 53. The download: test_download.py."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from bootlab import FRESH, Lab, in_loop, open_lab, state_machine

from mic_emu import layout as L
from mic_emu.card.os.bringup import BootError
from mic_emu.card.os.interrupts import CardInterrupts
from mic_emu.card.os.scif_link import CardLink
from mic_emu.card.os.vop import VopCard
from mic_emu.clock import Clock
from mic_emu.cosm.states import State, Status
from mic_emu.errors import MicemuError, StateError
from mic_emu.host.cosm import BootRequest
from mic_emu.host.running import Running
from mic_emu.host.scif_link import HostLink
from mic_emu.scif.node import Node
from mic_emu.testing.cosm import FakeConnection, message, settle

C = L.CONSTANTS
BOOT = L.BOOTPARAM


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab() as made:
        yield made


# --- boot ---------------------------------------------------------------------------------------------


@in_loop
async def test_hw_37_boot_needs_bootmode_and_ready() -> None:
    """HW-37: no bootmode: EINVAL; not ready: EINVAL; unready firmware: exactly one reset first."""
    dev, ops, clock = state_machine()
    with pytest.raises(StateError) as e:
        await dev.boot()
    assert (e.value.errno, ops.calls) == (errno.EINVAL, [])
    dev.bootmode = "linux"
    ops.is_ready = False
    booting = asyncio.ensure_future(dev.boot())
    await clock.advance(60)
    await booting
    assert ops.calls == ["reset", "start"]
    with pytest.raises(StateError) as e:
        await dev.boot()
    assert (e.value.errno, ops.calls) == (errno.EINVAL, ["reset", "start"])


@in_loop
async def test_hw_43_linux_is_booting_until_the_card_connects() -> None:
    """HW-43: booting after start for however long; online with COSM's connection."""
    dev, _, clock = state_machine()
    dev.bootmode = "linux"
    await dev.boot()
    await clock.advance(3600)
    assert dev.state is State.BOOTING
    await dev.adopt(FakeConnection(clock))
    assert dev.state.word == "online"


# --- card bring-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpu", [(6, 1), (11, 0), (11, 2)])
def test_hw_44_another_cpu(lab: Lab, cpu: tuple[int, int]) -> None:
    """HW-44: only family 11 model 1 is an X100; anything else is ENODEV, nothing is registered."""
    with pytest.raises(BootError) as e:
        lab.probe(cpu=cpu)
    assert e.value.errno == errno.ENODEV
    assert lab.gddr.used_bytes == 0
    assert lab.bus.read("dcr") >> 8 & 0xFF == 0
    assert lab.bootparam == FRESH


def test_hw_44_wrong_magic(lab: Lab) -> None:
    """HW-44: another magic in the device page is EIO, and the message has the value."""
    BOOT.put(lab.driver.page, 0, "magic", 0xDEADBEEF)
    with pytest.raises(BootError, match="0xdeadbeef") as e:
        lab.probe()
    assert e.value.errno == errno.EIO
    assert lab.gddr.used_bytes == 0


def test_hw_44_page_that_cannot_be_mapped(lab: Lab) -> None:
    """HW 1.3: SPAD14/15 that name no memory are ENOMEM."""
    lab.bus.write("spad", 0xFFFFF000, C["SPAD_DP_LO"])
    with pytest.raises(BootError) as e:
        lab.probe()
    assert e.value.errno == errno.ENOMEM


def test_hw_44_no_dma_channel(lab: Lab) -> None:
    """HW-44: four broken channels are ENODEV and leave no memory behind; a working set gives four."""
    for c in range(4, 8):
        lab.bus.hw_store("dcherr", 1, c)
    with pytest.raises(BootError) as e:
        lab.probe()
    assert e.value.errno == errno.ENODEV
    assert lab.gddr.used_bytes == 0
    for c in range(4, 8):
        lab.bus.hw_store("dcherr", 0, c)
    card = lab.probe(cpu=(11, 1))
    assert len(card.dma.channels) == 4
    assert card.node_id == 1
    card.remove(1.0)
    assert lab.gddr.used_bytes == 0


@in_loop
async def test_hw_45_the_page_after_probe_start_and_stop(image: str) -> None:
    """HW-45: the values of 6.5 after probe, start and stop, whatever the card wrote in between."""
    with open_lab() as lab:
        assert lab.bootparam == FRESH
        lab.driver.page.write(0, b"\xa5" * 24)
        await lab.driver.start(BootRequest("linux", image, "", ""))
        assert lab.bootparam == FRESH
        lab.driver.page.write(0, b"\x5a" * 24)
        await lab.driver.stop()
        assert lab.bootparam == FRESH


@in_loop
async def test_hw_45_51_card_doorbells_come_and_go_with_their_drivers(image: str) -> None:
    """HW-45: h2c_scif_db and h2c_config_db appear when SCIF's and VOP's card halves start, not before.
    HW-51: an orderly end leaves -1 and no queue pair of the card."""
    with open_lab() as lab:
        await lab.driver.start(BootRequest("linux", image, "", ""))
        card = lab.probe()
        assert lab.bootparam == FRESH
        node = Node(1, lab.gddr, lab.bus.gddr, Clock("fast"))
        await node.start()
        link = CardLink(node, lab.bus, card.page, card.interrupts, card.dma)
        assert lab.bootparam == FRESH
        link.start()
        assert lab.bootparam["h2c_scif_db"] == 0
        assert lab.bootparam["scif_card_dma_addr"] != 0
        assert lab.bootparam["h2c_config_db"] == -1
        vop = VopCard(lab.bus, card.page, lab.gddr, card.interrupts, Clock("fast"), lab.log, {})
        await vop.start()
        assert lab.bootparam["h2c_config_db"] == 1
        await vop.close()
        assert lab.bootparam["h2c_config_db"] == -1
        await link.stop()
        assert (lab.bootparam["scif_card_dma_addr"], lab.bootparam["h2c_scif_db"]) == (0, 0xFF)
        await node.close()
        card.remove(1.0)
        await lab.driver.stop()


async def attached(host: Node, card: Node, within_s: float) -> float:
    """Seconds until both nodes see each other."""
    began = time.monotonic()
    while not (host.path(1) and card.path(0)):
        assert time.monotonic() - began < within_s, f"not attached within {within_s} s"
        await asyncio.sleep(0)
    return time.monotonic() - began


@pytest.mark.parametrize("first", ["host", "card"])
@in_loop
async def test_hw_46_either_side_may_publish_first(first: str) -> None:
    """HW-46: whoever comes first, both are attached within two polling periods of the second."""
    with open_lab() as lab:
        clock = Clock("fast")
        host = Node(0, lab.pages, lab.bus.host, clock)
        card = Node(1, lab.gddr, lab.bus.gddr, clock)
        await host.start()
        await card.start()
        host_link = HostLink(host, 1, lab.bus, lab.driver, lab.pages, clock, lab.log)
        lines = CardInterrupts(lab.bus)
        card_link = CardLink(card, lab.bus, lab.driver.page, lines)
        order = [host_link, card_link] if first == "host" else [card_link, host_link]
        order[0].start()
        for _ in range(50):
            await asyncio.sleep(0)
        order[1].start()
        await attached(host, card, 20)
        await asyncio.gather(host_link.stop(), card_link.stop())
        await card.close()
        await host.close()


# --- stop, shutdown, crash -------------------------------------------------------------------------------


@in_loop
async def test_hw_48_requests_in_the_wrong_state() -> None:
    """HW-48: shutdown outside online: EINVAL, without endpoint: ENOTCONN; reset in ready: EINVAL;
    a second reset while one runs: success and no second reset."""
    dev, ops, clock = state_machine()
    for request in (dev.shutdown, dev.reset):
        with pytest.raises(MicemuError) as e:
            await request()
        assert e.value.errno == errno.EINVAL
    dev.bootmode = "linux"
    await dev.boot()
    with pytest.raises(MicemuError) as e:
        await dev.shutdown()
    assert e.value.errno == errno.EINVAL
    connection = FakeConnection(clock)
    await dev.adopt(connection)
    connection.hang_up()
    await settle()
    with pytest.raises(MicemuError) as e:
        await dev.shutdown()
    assert e.value.errno == errno.ENOTCONN
    ops.gate = asyncio.Event()
    await dev.reset()
    await settle()
    assert dev.state is State.RESETTING
    await dev.reset()
    ops.gate.set()
    await clock.advance(5)
    assert dev.state is State.READY
    assert ops.calls == ["start", "stop", "reset"]


@in_loop
async def test_cosm_39_dma_channels_come_before_scif_and_virtio(image: str) -> None:
    """COSM-39: whoever brings up SCIF finds the channels."""
    with open_lab() as lab:
        found: list[int] = []

        async def bring_up() -> None:
            found.append(len(lab.driver.dma.channels) if lab.driver.dma else 0)

        lab.driver.bring_up = bring_up
        await lab.driver.start(BootRequest("linux", image, "", ""))
        assert found == [4]
        await lab.driver.stop()


@in_loop
async def test_cosm_39_scif_comes_before_virtio(monkeypatch: pytest.MonkeyPatch) -> None:
    """COSM-39: the queue pair is published before a device is added."""
    steps: list[str] = []

    async def listen(path: str) -> None:
        steps.append("files")

    monkeypatch.setattr("mic_emu.host.running.plan", lambda card: ["console", "net"])
    running = Running.__new__(Running)
    running.card = SimpleNamespace(dir=Path("card"))  # type: ignore[assignment]
    running.link = SimpleNamespace(start=lambda: steps.append("scif"))  # type: ignore[assignment]
    running.files = SimpleNamespace(listen=listen)  # type: ignore[assignment]
    running.supervisor = SimpleNamespace(add=steps.append)  # type: ignore[assignment]
    await running.start()
    assert steps == ["scif", "files", "console", "net"]


@in_loop
async def test_hw_49_cosm_39_order_of_a_stop(image: str) -> None:
    """HW-49: VOP and SCIF while the DMA channels still live, then DMA, then the boot parameters; once."""
    with open_lab() as lab:
        steps: list[str] = []

        async def tear_down() -> None:
            steps.append(f"vop, scif with {len(lab.driver.dma.channels) if lab.driver.dma else 0} channels")

        lab.driver.tear_down = tear_down
        initialise = lab.driver.init_bootparam

        def note() -> None:
            steps.append("bootparam" if lab.driver.dma is None else "bootparam with DMA")
            initialise()

        vectors = len(lab.driver.irq.rows())
        await lab.driver.start(BootRequest("linux", image, "", ""))
        lab.driver.init_bootparam = note  # type: ignore[method-assign]
        await lab.driver.stop()
        assert steps == ["vop, scif with 4 channels", "bootparam"]
        assert lab.bus.read("dcr") & 0xAA == 0  # no channel is enabled any more
        assert len([row for row in lab.driver.irq.rows() if row[2]]) <= vectors


@in_loop
async def test_hw_49_cosm_39_vop_goes_before_scif() -> None:
    """HW-49: backends and device files, then their devices, then the SCIF link; each once."""
    steps: list[str] = []

    def part(name: str) -> SimpleNamespace:
        async def end() -> None:
            steps.append(name)

        return SimpleNamespace(stop=end, close=end)

    running = Running.__new__(Running)
    running.supervisor, running.files = part("backends"), part("files")  # type: ignore[assignment]
    running.vop, running.link = part("vop"), part("scif")  # type: ignore[assignment]
    await running.stop()
    assert steps == ["backends", "files", "vop", "scif"]


@in_loop
async def test_hw_49_nothing_is_stopped_twice() -> None:
    """HW-49: the reset after reset_failed only resets, whoever asks for it."""
    dev, ops, clock = state_machine()
    dev.bootmode = "linux"
    await dev.boot()
    ops.polls = -1
    await dev.reset()
    await clock.advance(60)
    assert (dev.state, ops.calls) == (State.RESET_FAILED, ["start", "stop", "reset"])
    ops.polls = 0
    await dev.stop(force=True)
    assert (dev.state, ops.calls) == (State.READY, ["start", "stop", "reset", "reset"])


@in_loop
async def test_hw_49_failed_bring_up_is_undone(image: str) -> None:
    """HW 6.3: what comes up before the failure goes down again; the next start works."""
    with open_lab() as lab:
        steps: list[str] = []

        async def bring_up() -> None:
            steps.append("up")
            raise MicemuError("no devices", errno.ENOENT)

        async def tear_down() -> None:
            steps.append("down")

        lab.driver.bring_up, lab.driver.tear_down = bring_up, tear_down
        used = lab.pages.used_bytes
        with pytest.raises(MicemuError):
            await lab.driver.start(BootRequest("linux", image, "", ""))
        assert steps == ["up", "down"]
        assert lab.pages.used_bytes == used
        assert lab.bus.read("apicicr", 7) == 0
        lab.driver.bring_up = None
        await lab.driver.start(BootRequest("linux", image, "", ""))
        assert lab.bus.read("apicicr", 7) & 0xFF == C["BOOT_VECTOR"] & 0xFF
        await lab.driver.stop()


@in_loop
async def test_hw_50_crashed_40_s_after_the_last_heartbeat() -> None:
    """HW-50: 40 s without a word: crashed and shutting_down, and no reset for however long; switched off: online."""
    for watched in (True, False):
        dev, ops, clock = state_machine()
        dev.bootmode = "linux"
        dev.set_heartbeat(watched)
        await dev.boot()
        connection = FakeConnection(clock)
        await dev.adopt(connection)
        for _ in range(3):
            await clock.advance(30)
            connection.say(message("HEARTBEAT"))
            await settle()
        await clock.advance(39.9)
        assert (dev.state, dev.shutdown_status) == (State.ONLINE, Status.NOP)
        await clock.advance(0.2)
        crashed = (State.SHUTTING_DOWN, Status.CRASHED)
        for _ in range(2):
            assert (dev.state, dev.shutdown_status) == (crashed if watched else (State.ONLINE, Status.NOP))
            await clock.advance(86400)
        assert ops.calls == ["start"]


@in_loop
async def test_hw_51_status_comes_with_the_hang_up() -> None:
    """HW-51: the card's shutdown status is published only when its endpoint has closed."""
    dev, _, clock = state_machine()
    dev.bootmode = "linux"
    await dev.boot()
    connection = FakeConnection(clock)
    await dev.adopt(connection)
    await dev.shutdown()
    connection.say(message("SHUTDOWN_STATUS", 3))
    await settle()
    assert (dev.state, dev.shutdown_status) == (State.SHUTTING_DOWN, Status.NOP)
    connection.hang_up()
    await settle()
    assert dev.shutdown_status is Status.POWEROFF


@pytest.mark.parametrize("state", ["ready", "booting", "online", "shutting_down"])
@in_loop
async def test_hw_53_suspend_and_resume(state: str) -> None:
    """HW-53: suspend resets what runs and nothing else; afterwards the card stays ready: resume does nothing."""
    dev, ops, clock = state_machine()
    dev.bootmode = "linux"
    if state != "ready":
        await dev.boot()
    if state in ("online", "shutting_down"):
        await dev.adopt(FakeConnection(clock))
    if state == "shutting_down":
        await dev.shutdown()
    assert dev.state.word == state
    suspend = asyncio.ensure_future(dev.suspend())
    await clock.advance(5)
    await suspend
    assert dev.state is State.READY
    assert ops.calls == ([] if state == "ready" else ["start", "stop", "reset"])
    calls = list(ops.calls)
    await clock.advance(600)
    assert (dev.state, ops.calls) == (State.READY, calls)
    assert not hasattr(dev, "resume")

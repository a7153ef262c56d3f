"""The sysfs and debugfs trees as paths, for the FUSE mount and for ``micemu sysfs`` (COSM 6, 7, 9).

class/mic/micN/<attribute>          class/mic/micN/device -> devices/micemu/<slot>/{config,uevent,vendor,...}
class/mic/micN/{uevent,subsystem}   class/mic/micN/power/{control,runtime_status,...}
kernel/debug/mic_cosm/micN/{log_buf,force_reset}
kernel/debug/mic_host/micN/{smpt,post_code,msi_irq_info}    kernel/debug/mic_x100_dma/mbus-devN/mic_dma_reg
kernel/debug/mic_card/micN/intr_test (the card's own file: mic_card/mic there)
kernel/debug/scif/scif_dev          kernel/debug/vopN/{dp,vdev_info}
"""

from __future__ import annotations

import asyncio
import errno
import re
import stat
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from mic_emu import layout as L
from mic_emu.errors import MicemuError, NoSuchCard, WaitTimeout
from mic_emu.host import debugfs, vop_debug
from mic_emu.host.attributes import ATTRIBUTES, LOG_STATES, Refused, parse_int
from mic_emu.host.card_os import ask_os
from mic_emu.host.cosm import CosmDevice
from mic_emu.host.device_class import DeviceClass, File, Read, constant
from mic_emu.memory import View
from mic_emu.pciconfig import ConfigSpace
from mic_emu.scif.errors import ScifError
from mic_emu.wire_aio import AsyncChannel

if TYPE_CHECKING:
    from mic_emu.host.card import Card
    from mic_emu.host.daemon import Instance

C = L.CONSTANTS
DEVICES = "devices/micemu"  # where the kernel would have the cards' PCI functions
LOG_MOST = 2 << 20  # bytes of a card's log, twice what ours keeps: the length is the card's word
INTR_TEST_S = 10.0  # beyond the pauses of the test itself


def pci_slot(index: int) -> str:
    """Domain, bus, device and function of a card."""
    return f"0000:{index + 1:02x}:00.0"


def log_buffer(gddr: View, addr: int, len_addr: int) -> bytes:
    """The card's kernel log: ``addr`` and ``len_addr`` are card kernel addresses of text and of its u32
    length. Out of range, or more than ``LOG_MOST``: empty (COSM-62)."""
    text, length = addr - C["CARD_TEXT_BASE"], len_addr - C["CARD_TEXT_BASE"]
    if not 0 <= length <= gddr.size - 4 or not 0 <= text <= gddr.size:
        return b""
    size = int.from_bytes(gddr.read(length, 4), "little")  # the address need not be aligned
    return gddr.read(text, size) if size <= min(gddr.size - text, LOG_MOST) else b""


def _lazy(make: Callable[[], str | bytes]) -> Read:
    async def read() -> bytes:
        made = make()
        return made if isinstance(made, bytes) else made.encode()

    return read


class Sysfs:
    """The files of an instance. Built anew for each look: cards come and go."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.switches = {"en_msg_log": 0, "p2p_enable": 1}
        self.device_class = DeviceClass()

    def tree(self) -> dict[str, File]:
        """All files by path."""
        files: dict[str, File] = {}
        for card in self.instance.cards.values():
            files |= self._class(card) | self._debug(card)
        files["kernel/debug/scif/scif_dev"] = File(0o444, _lazy(self._scif_dev))
        for name in self.switches:
            files[f"kernel/debug/scif/{name}"] = self._switch(name)
        return files

    def _switch(self, name: str) -> File:
        """A byte that is kept and has no effect here: there is no message log, cards always reach each other."""

        async def read() -> bytes:
            return b"%d\n" % self.switches[name]

        async def write(data: bytes) -> None:
            value = parse_int(data.decode("latin-1").removesuffix("\n"))
            if not 0 <= value <= 255:
                raise Refused(f"{value} does not fit in a byte", errno.ERANGE)
            self.switches[name] = value

        return File(0o666, read, write)

    def file(self, path: str) -> File:
        """One file, also through a card's link to its PCI function. Raises MicemuError ENOENT."""
        linked = re.match(r"class/mic/mic([0-9]{1,3})/device/(.*)", path)
        target = f"{DEVICES}/{pci_slot(int(linked[1]))}/{linked[2]}" if linked else path
        try:
            return self.tree()[target]
        except KeyError:
            pass
        card = re.match(r"class/mic/(mic[0-9]+)(/|$)", path)
        if card and card[1] not in self.instance.cards:
            known = ", ".join(self.instance.cards) or "none is plugged in"
            missing = NoSuchCard(f"there is no card {card[1]}; cards: {known}")
            missing.errno = errno.ENOENT  # as a shell sees it
            raise missing
        raise MicemuError(f"there is no file {path} (micemu sysfs ls shows those that are)", errno.ENOENT)

    async def write(self, path: str, data: bytes) -> None:
        """Write to a file. Raises MicemuError with the errno that the kernel would give, and the file's name."""
        target = self.file(path)
        name = path.removeprefix("class/mic/")
        if target.write is None:
            raise Refused(f"{name} cannot be written", errno.EACCES)
        try:
            await target.write(data)
        except MicemuError as e:
            e.args = (f"{name}: {e}",)
            raise
        except ScifError as e:
            raise MicemuError(f"{name}: {e}", e.errno or errno.EIO) from e
        except TimeoutError as e:
            raise WaitTimeout(f"{name}: {e}") from e

    # --- class/mic/micN ---------------------------------------------------------------------------

    def _class(self, card: Card) -> dict[str, File]:
        base, cosm = f"class/mic/{card.name}", card.cosm
        pci = ConfigSpace(card.bus)
        files = {
            f"{base}/family": File(0o444, constant(f"{pci.family or 'Unknown'}\n".encode())),
            f"{base}/stepping": File(0o444, constant(f"{pci.stepping}\n".encode())),
            **self.device_class.files(card.name),
        }
        for name, attribute in ATTRIBUTES.items():

            async def read(a: Callable[..., bytes] = attribute.read) -> bytes:
                return a(cosm)

            async def write(data: bytes, a: Callable[..., Awaitable[None]] = attribute.write) -> None:
                await a(cosm, data)

            writable = write if attribute.store else None
            wakes = card.name if name == "state" else ""
            files[f"{base}/{name}"] = File(attribute.mode, read, writable, wakes)
        function = f"{DEVICES}/{pci_slot(card.index)}"
        files[f"{base}/device"] = File(stat.S_IFLNK | 0o777, constant(f"../../../{function}".encode()))
        for name, text in self._device(card, pci).items():
            files[f"{function}/{name}"] = File(0o444, constant(text))
        files[f"{function}/config"] = File(0o444, _lazy(pci.raw))
        return files

    def _device(self, card: Card, pci: ConfigSpace) -> Mapping[str, bytes]:
        """Files of the PCI function that tools look at (COSM 13.5)."""
        sub = pci.read(0x2C, 4)
        ids = f"{pci.vendor:04X}:{pci.device:04X}"
        uevent = (
            f"DRIVER=mic\nPCI_CLASS={pci.read(8, 4) >> 8:X}\nPCI_ID={ids}\n"
            f"PCI_SUBSYS_ID={sub & 0xFFFF:04X}:{sub >> 16:04X}\nPCI_SLOT_NAME={pci_slot(card.index)}\n"
        )
        return {
            "uevent": uevent.encode(), "vendor": f"{pci.vendor:#06x}\n".encode(), "device": f"{pci.device:#06x}\n".encode(),
            "class": f"{pci.read(8, 4) >> 8:#08x}\n".encode(), "revision": f"{pci.revision:#04x}\n".encode(),
            "subsystem_vendor": f"{sub & 0xFFFF:#06x}\n".encode(), "subsystem_device": f"{sub >> 16:#06x}\n".encode(),
        }  # fmt: skip

    # --- kernel/debug -----------------------------------------------------------------------------

    def _debug(self, card: Card) -> dict[str, File]:
        cosm, host = f"kernel/debug/mic_cosm/{card.name}", f"kernel/debug/mic_host/{card.name}"
        vop, mbus = f"kernel/debug/vop{card.index + 1}", f"mbus-dev{card.index}"

        async def force_reset() -> bytes:
            await card.cosm.stop(force=True)
            return b""

        async def intr_test() -> bytes:
            try:
                limit = card.clock.delay(C["SRC_DOORBELLS"]) + card.clock.limit(INTR_TEST_S)
                await ask_os(card.dir, "intr_test", limit)
            except OSError as e:
                raise MicemuError(
                    f"{card.name}: its card OS does not ring: {e.strerror or e}", errno.ENODEV
                ) from e
            return b""

        async def vdev_info() -> bytes:
            return (await vop_debug.rings(card)).encode()

        return {
            f"{cosm}/log_buf": File(0o444, _lazy(lambda: self.log_buf(card))),
            f"{cosm}/force_reset": File(0o444, force_reset),
            f"kernel/debug/mic_card/{card.name}/intr_test": File(0o444, intr_test),
            f"{host}/post_code": File(0o444, _lazy(lambda: debugfs.post_code(card.bus))),
            f"{host}/smpt": File(0o444, _lazy(lambda: debugfs.smpt(card.index, card.driver.smpt))),
            f"{host}/msi_irq_info": File(
                0o444, _lazy(lambda: debugfs.msi_irq_info(card.driver.irq, card.bus))
            ),
            f"{vop}/dp": File(0o444, _lazy(lambda: vop_debug.page(card))),
            f"{vop}/vdev_info": File(0o444, vdev_info),
            f"kernel/debug/mic_x100_dma/{mbus}/mic_dma_reg": File(
                0o444, _lazy(lambda: debugfs.mic_dma_reg(mbus, card.bus, range(C["DMA_HOST_CHANNELS"])))
            ),
        }

    async def debug_text(self, card: Card) -> str:
        """The card's debug files one after the other, but those whose reading does something."""
        texts = []
        for path, file in self._debug(card).items():
            if not path.endswith(("/force_reset", "/intr_test")):
                text = (await file.read()).decode(errors="replace")
                texts.append(f"==> {path.removeprefix('kernel/debug/')} <==\n{text.rstrip()}\n")
        return "\n".join(texts)

    def log_buf(self, card: Card) -> bytes:
        """Empty unless both addresses are set and a log can exist (COSM-61)."""
        cosm = card.cosm
        if not cosm.log_buf_addr or not cosm.log_buf_len or cosm.state not in LOG_STATES:
            return b""
        return log_buffer(card.bus.gddr, cosm.log_buf_addr, cosm.log_buf_len)

    def _scif_dev(self) -> str:
        node = self.instance.node
        online = set(node.node_ids())
        lines = [
            f"Total Nodes {len(online)} Self Node Id {node.id} Maxid {node.maxid}",
            f"{'node_id':>16}{'state':>16}",
        ]
        for n in range(node.maxid + 1):
            lines.append(f"{n:>16}{'Running' if n in online else 'Offline':>16}")
        return "\n".join(lines) + "\n"


async def watch_states(instance: Instance, channel: AsyncChannel, gone: asyncio.Future[Any]) -> None:
    """Send each card's state when it is new, until ``gone``."""
    wake = asyncio.Event()
    told: dict[str, tuple[int, str]] = {}
    hooked: list[CosmDevice] = []
    gone.add_done_callback(lambda _: wake.set())
    instance.card_watchers.add(wake)
    try:
        while not gone.done():
            wake.clear()
            there = [card.cosm for card in instance.cards.values()]
            for cosm in [c for c in hooked if c not in there]:  # unplugged, and with it all that hangs on it
                hooked.remove(cosm)
                cosm.on_state.remove(wake.set)
            for card in list(instance.cards.values()):
                if card.cosm not in hooked:
                    hooked.append(card.cosm)
                    card.cosm.on_state.append(wake.set)
                now = (card.cosm.changes, card.cosm.state.word)
                if told.get(card.name) != now:
                    told[card.name] = now
                    await channel.send({"card": card.name, "changes": now[0], "state": now[1]})
            await wake.wait()
    finally:
        instance.card_watchers.discard(wake)
        for cosm in hooked:
            cosm.on_state.remove(wake.set)
